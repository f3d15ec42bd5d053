BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'golden/notes');
INSERT INTO "studies" VALUES(2,'golden/ramp');
INSERT INTO "studies" VALUES(3,'golden/heldout ff10fd0cd384e1f9e5b9012d');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
INSERT INTO "study_directions" VALUES(2,'MAXIMIZE',2,0);
INSERT INTO "study_directions" VALUES(3,'MAXIMIZE',3,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'content','{"version": 2, "sigmas": [1.0, 0.9, 0.75, 0.5, 0.0], "flow": true, "solver": "euler", "search": {"strategy": "gp", "budget": 8, "seed": 0, "low": 0.9, "high": 1.1, "radius": 0.1, "ends": false, "fidelity": "full", "proposals": 1}, "calibration": "42334592d534d2e9eb1cf6baec4c303f0dc68a0743cfb6a093fc3b0c12fc8fe9", "provenance": {"m": 1}}');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'c_x start',1.0,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(2,1,'c_eps start',1.0,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(3,2,'c_x start',9.95021438598632901317e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(4,2,'c_eps start',1.01850479841232299804e+00,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(5,3,'c_x start',1.01575266793370255768e+00,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(6,3,'c_eps start',9.07424388080835364611e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(7,4,'c_x start',1.090133976563811391e+00,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(8,4,'c_eps start',1.07246880941092981309e+00,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(9,5,'c_x start',9.240915738046169281e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(10,5,'c_eps start',9.52288441173732347344e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(11,6,'c_x start',1.057,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(12,6,'c_eps start',0.9,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(13,7,'c_x start',1.0371,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(14,7,'c_eps start',0.9379,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(15,8,'c_x start',1.1,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(16,8,'c_eps start',0.9275,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(17,9,'c_x start',1.0479,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
INSERT INTO "trial_params" VALUES(18,9,'c_eps start',0.9458,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.9, "high": 1.1, "log": false}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'slot','0');
INSERT INTO "trial_user_attributes" VALUES(2,1,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(3,1,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(4,2,'slot','1');
INSERT INTO "trial_user_attributes" VALUES(5,2,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(6,2,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(7,3,'slot','2');
INSERT INTO "trial_user_attributes" VALUES(8,3,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(9,3,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(10,4,'slot','3');
INSERT INTO "trial_user_attributes" VALUES(11,4,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(12,4,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(13,1,'record','{"slot": 0, "scores": {"alignment": [2.993207865168539, 3.712308988764045, 3.719687800963082, 3.4423105939004817, 3.8506621187800967, 3.2683210272873193, 3.32642937399679, 3.4012239165329055, 3.3713731942215093, 3.605399678972713], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [3.993207865168539, 4.712308988764045, 4.719687800963082, 4.442310593900482, 4.850662118780097, 4.268321027287319, 4.32642937399679, 4.4012239165329055, 4.371373194221509, 4.605399678972713], "terms": {}}, "seconds": 2.527999998847008e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(14,2,'record','{"slot": 1, "scores": {"alignment": [2.978300326689001, 3.6974014502845067, 3.7033604969140637, 3.423143758712504, 3.832915049161599, 3.251283840453562, 3.3101020699477717, 3.383476846914408, 3.355045890172491, 3.5883624921389554], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [3.978300326689001, 4.697401450284507, 4.703360496914064, 4.423143758712504, 4.832915049161599, 4.251283840453562, 4.310102069947772, 4.383476846914408, 4.355045890172491, 4.588362492138955], "terms": {}}, "seconds": 2.527999998847008e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(15,3,'record','{"slot": 2, "scores": {"alignment": [3.0142168639957525, 3.733317987591258, 3.7426976568214583, 3.469322163821184, 3.875672831669636, 3.292331311661277, 3.3494392298551663, 3.426234629422445, 3.3943830500798855, 3.6294099633466708], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.0142168639957525, 4.733317987591258, 4.742697656821458, 4.469322163821184, 4.875672831669636, 4.292331311661277, 4.349439229855166, 4.426234629422445, 4.3943830500798855, 4.629409963346671], "terms": {}}, "seconds": 2.527999998847008e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(16,4,'record','{"slot": 3, "scores": {"alignment": [2.925162160025113, 3.644263283620619, 3.645161552472663, 3.3548232587160767, 3.7696553269426847, 3.1905545071234034, 3.251903125506371, 3.3202171246954935, 3.2968469457310903, 3.527633158808797], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [3.925162160025113, 4.644263283620619, 4.645161552472663, 4.354823258716077, 4.769655326942685, 4.190554507123403, 4.251903125506371, 4.3202171246954935, 4.29684694573109, 4.527633158808797], "terms": {}}, "seconds": 2.527999998847008e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(17,5,'slot','4');
INSERT INTO "trial_user_attributes" VALUES(18,5,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(19,5,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(20,5,'record','{"slot": 4, "scores": {"alignment": [2.952440345401141, 3.6715414689966472, 3.6750376602654553, 3.389895211342399, 3.802129357152242, 3.221729576124579, 3.2817792332991633, 3.3526911549050507, 3.3267230535238825, 3.5588082278099726], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [3.952440345401141, 4.671541468996647, 4.675037660265455, 4.389895211342399, 4.802129357152242, 4.221729576124579, 4.281779233299163, 4.352691154905051, 4.3267230535238825, 4.558808227809973], "terms": {}}, "seconds": 4.754099995807337e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(21,6,'slot','5');
INSERT INTO "trial_user_attributes" VALUES(22,6,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(23,6,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(24,6,'record','{"slot": 5, "scores": {"alignment": [3.0153191985018726, 3.734420322097378, 3.743904975566257, 3.4707394510433387, 3.876985134653113, 3.293591122525415, 3.350646548599965, 3.427546932405922, 3.395590368824684, 3.6306697742108085], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.015319198501873, 4.734420322097378, 4.743904975566257, 4.470739451043339, 4.876985134653113, 4.293591122525415, 4.350646548599965, 4.427546932405922, 4.395590368824684, 4.6306697742108085], "terms": {}}, "seconds": 8.10009998986061e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(25,7,'slot','6');
INSERT INTO "trial_user_attributes" VALUES(26,7,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(27,7,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(28,7,'record','{"slot": 6, "scores": {"alignment": [3.021630038501873, 3.7407311620973784, 3.750816847947209, 3.478853388186196, 3.8844980394150177, 3.3008035110968432, 3.357558420980917, 3.4350598371678265, 3.402502241205636, 3.637882162782237], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.021630038501873, 4.740731162097378, 4.750816847947209, 4.478853388186196, 4.884498039415018, 4.300803511096843, 4.357558420980917, 4.4350598371678265, 4.402502241205636, 4.637882162782237], "terms": {}}, "seconds": 6.037999992258847e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(29,8,'slot','7');
INSERT INTO "trial_user_attributes" VALUES(30,8,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(31,8,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(32,8,'record','{"slot": 7, "scores": {"alignment": [3.0075120318352058, 3.7266131554307114, 3.7353542692170505, 3.4607016653290534, 3.8676908886213663, 3.2846686463349384, 3.3420958422507585, 3.418252686374175, 3.3870396624754777, 3.621747298020332], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.007512031835206, 4.726613155430711, 4.7353542692170505, 4.460701665329053, 4.867690888621366, 4.284668646334938, 4.3420958422507585, 4.418252686374175, 4.387039662475478, 4.621747298020332], "terms": {}}, "seconds": 5.043600003773463e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(33,9,'slot','8');
INSERT INTO "trial_user_attributes" VALUES(34,9,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(35,9,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(36,9,'record','{"slot": 8, "scores": {"alignment": [3.021429631835206, 3.7405307554307115, 3.750597354931336, 3.47859572247191, 3.884259460049938, 3.300574474906367, 3.357338927965044, 3.4348212578027466, 3.402282748189763, 3.6376531265917604], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.021429631835206, 4.7405307554307115, 4.750597354931336, 4.47859572247191, 4.884259460049938, 4.300574474906367, 4.357338927965044, 4.434821257802747, 4.402282748189763, 4.63765312659176], "terms": {}}, "seconds": 5.096599988974049e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(37,10,'slot','0');
INSERT INTO "trial_user_attributes" VALUES(38,10,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(39,10,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(40,11,'slot','1');
INSERT INTO "trial_user_attributes" VALUES(41,11,'beat','0');
INSERT INTO "trial_user_attributes" VALUES(42,11,'worker','"11067@machine"');
INSERT INTO "trial_user_attributes" VALUES(43,10,'record','{"slot": 0, "scores": {"alignment": [3.678601123595506, 3.6821227929374, 3.440717495987159, 3.6073282504012845, 3.3508298555377207, 3.1540329052969502, 3.182290529695024, 3.5697632423756023, 3.2291629213483146, 3.873134028892456, 3.241991974317817, 3.543769662921348], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.678601123595506, 4.6821227929374, 4.440717495987159, 4.6073282504012845, 4.350829855537721, 4.15403290529695, 4.182290529695024, 4.569763242375602, 4.229162921348315, 4.873134028892456, 4.241991974317817, 4.543769662921348], "terms": {}}, "seconds": 3.382049999345327e-05, "model_evaluations": 0, "pruned": false}');
INSERT INTO "trial_user_attributes" VALUES(44,11,'record','{"slot": 1, "scores": {"alignment": [3.7070232969288393, 3.715958713572321, 3.470493106145889, 3.6384572973854112, 3.3806054656964504, 3.1878688259318713, 3.2120661398537536, 3.6035991630105233, 3.257585094681648, 3.906969949527377, 3.2771813317781344, 3.5721918362546816], "quality": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "jaq": [4.707023296928839, 4.715958713572321, 4.470493106145889, 4.638457297385411, 4.38060546569645, 4.187868825931871, 4.2120661398537536, 4.603599163010523, 4.257585094681648, 4.906969949527377, 4.277181331778134, 4.572191836254682], "terms": {}}, "seconds": 3.382049999345327e-05, "model_evaluations": 0, "pruned": false}');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,4.46909245585874792539e+00,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,4.4523392221388862211e+00,'FINITE');
INSERT INTO "trial_values" VALUES(3,3,0,4.49270256882647345264e+00,'FINITE');
INSERT INTO "trial_values" VALUES(4,4,0,4.39262204436423076003e+00,'FINITE');
INSERT INTO "trial_values" VALUES(5,5,0,4.42327752888205338877e+00,'FINITE');
INSERT INTO "trial_values" VALUES(6,6,0,4.49394138284287514295e+00,'FINITE');
INSERT INTO "trial_values" VALUES(7,7,0,4.50103356493811368466e+00,'FINITE');
INSERT INTO "trial_values" VALUES(8,8,0,4.48516761458890744762e+00,'FINITE');
INSERT INTO "trial_values" VALUES(9,9,0,4.50080834601747703516e+00,'FINITE');
INSERT INTO "trial_values" VALUES(10,10,0,4.46281206527554896723e+00,'FINITE');
INSERT INTO "trial_values" VALUES(11,11,0,4.49416668506390859505e+00,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,2,'COMPLETE','2026-11-26 18:27:16.935958','2026-11-26 18:27:17.279985');
INSERT INTO "trials" VALUES(2,1,2,'COMPLETE','2026-11-26 18:27:17.044364','2026-11-26 18:27:17.336417');
INSERT INTO "trials" VALUES(3,2,2,'COMPLETE','2026-11-26 18:27:17.109893','2026-11-26 18:27:17.398797');
INSERT INTO "trials" VALUES(4,3,2,'COMPLETE','2026-11-26 18:27:17.180933','2026-11-26 18:27:17.464664');
INSERT INTO "trials" VALUES(5,4,2,'COMPLETE','2026-11-26 18:27:17.536224','2026-11-26 18:27:17.641530');
INSERT INTO "trials" VALUES(6,5,2,'COMPLETE','2026-11-26 18:27:17.844578','2026-11-26 18:27:17.974451');
INSERT INTO "trials" VALUES(7,6,2,'COMPLETE','2026-11-26 18:27:18.161813','2026-11-26 18:27:18.246547');
INSERT INTO "trials" VALUES(8,7,2,'COMPLETE','2026-11-26 18:27:18.387846','2026-11-26 18:27:18.486266');
INSERT INTO "trials" VALUES(9,8,2,'COMPLETE','2026-11-26 18:27:18.692523','2026-11-26 18:27:18.810737');
INSERT INTO "trials" VALUES(10,0,3,'COMPLETE','2026-11-26 18:27:18.906516','2026-11-26 18:27:19.070329');
INSERT INTO "trials" VALUES(11,1,3,'COMPLETE','2026-11-26 18:27:18.968470','2026-11-26 18:27:19.135691');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
