"""FID: the published network's structure, from files with its keys; never a download."""

from __future__ import annotations

import pytest
import torch

from qsched_core.evaluation import inception
from qsched_core.scorers import ScorerError

torchvision = pytest.importorskip("torchvision")
TF_FILE, _, TV_FILE = inception.FILES


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub folder with random weights under the names of both files."""
    root = tmp_path_factory.mktemp("hub")
    (root / "pyiqa").mkdir()
    (root / "checkpoints").mkdir()
    for name, classes, aux in ((TF_FILE, 1008, False), (TV_FILE, 1000, True)):
        torch.manual_seed(0)
        model = torchvision.models.Inception3(classes, aux_logits=aux, init_weights=False)
        torch.save({k: v.half() for k, v in model.state_dict().items()}, root / name)
    return root


def images(n=2, size=75):
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(3))


def test_without_weights_there_is_a_reason_that_names_the_files(tmp_path):
    reason = inception.available(tmp_path)
    assert "checkpoints/pt_inception-2015-12-05-6726825d.pth" in reason
    with pytest.raises(ScorerError, match="not downloaded"):
        inception.inception_space(tmp_path)


def test_the_published_weights_come_first_and_others_are_said_to_differ(hub, tmp_path):
    assert inception.available(hub) is None
    space = inception.inception_space(hub)
    assert space.description["weights"] == "tf" and not space.note
    features = space.encode(images())
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert features[0].std() > 0 and not torch.allclose(features[0], features[1], rtol=1e-3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / TV_FILE).symlink_to(hub / TV_FILE)
    other = inception.inception_space(tmp_path)
    assert other.description["weights"] == "torchvision"
    assert "not those of the published FID" in other.note
    # the same weights in both files: what differs is the network
    assert not torch.allclose(other.encode(images()), features, rtol=1e-2)


def test_the_pooling_is_the_published_networks(hub):
    """Averages leave the padding out; the last block takes maxima, the one before it averages."""
    model = inception._load(inception.find_weights(hub))
    ones = torch.ones(1, 192, 9, 9)
    pooled = model.Mixed_5b._forward(ones)[-1]
    assert torch.allclose(pooled, pooled[..., :1, :1])  # the border is as the middle
    x = torch.rand(1, 2048, 5, 5)
    maxima = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    assert torch.equal(model.Mixed_7c._forward(x)[-1], model.Mixed_7c.branch_pool(maxima))
    y = torch.ones(1, 1280, 5, 5)
    pooled = model.Mixed_7b._forward(y)[-1]
    assert torch.allclose(pooled, pooled[..., :1, :1])


def test_a_file_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "pyiqa").mkdir()
    path = tmp_path / TF_FILE
    for content in (b"no weights", None):
        if content is None:
            torch.save({"fc.weight": torch.ones(3)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ScorerError, match="delete it"):
            inception.inception_space(tmp_path)
