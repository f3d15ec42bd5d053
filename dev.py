#!/usr/bin/env python3
"""Everything a developer runs, with nothing but Python installed.

python dev.py demo [--out DIR]        the whole job in a real ComfyUI, with pictures and a table
python dev.py test [pytest options]   the tests, but for the slow ones that --full adds
python dev.py serve [--port N]        ComfyUI with this pack and the demo model, in your browser
python dev.py bench NAME [--json F]   one benchmark

Each makes or reuses the project's virtual environment (.venv) and ComfyUI (.host).  The variable
COMFYUI_PATH names a ComfyUI of your own to use instead.  Before the command, --python and --with ask
for an environment of its own, of another Python or with other packages:

python dev.py --python 3.12 --with comfy-kitchen==0.2.40 test tests/host
"""

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", metavar="VERSION", help="of the environment; 3.12, or a path")
    parser.add_argument(
        "--with", action="append", default=[], metavar="PACKAGE", dest="packages",
        help="a package as pip takes it, in place of the version that ComfyUI asks for",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the demo (further options go to demo/run.py)")
    demo.add_argument("--out", type=Path, default=ROOT / "output" / "demo", metavar="DIR")
    commands.add_parser("test", help="run the tests (options go to pytest)", add_help=False)
    serve = commands.add_parser("serve", help="start ComfyUI (further options go to it)")
    serve.add_argument("--port", type=int, default=8188)
    bench = commands.add_parser("bench", help="run a benchmark (further options go to it)")
    bench.add_argument("name")
    bench.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_known_args(argv)


def demo(environment, options, more):
    out = str(options.out.resolve())
    return environment.run(
        "-m", "demo.run", "--out", out, "--comfyui", str(environment.comfyui), *more
    )


def test(environment, options, more):
    return environment.run("-m", "pytest", *lanes(more), *more)


def lanes(more):
    """Two lanes side by side for the whole suite; what is selected runs in one, as pytest does."""
    if all(option == "--full" or option.startswith("--durations") for option in more):
        return ["-n", "2", "--dist", "loadscope", "--durations", "10"]
    return []


def serve(environment, options, more):
    from devtools.serve import serve

    return serve(environment, options.port, tuple(more))


def bench(environment, options, more):
    if options.json:
        more = ["--json", str(options.json.resolve()), *more]
    return environment.run("-m", f"benchmarks.{options.name}", *more)


COMMANDS = {"demo": demo, "test": test, "serve": serve, "bench": bench}


def check(options):
    """Refuse what cannot work before anything is installed for it."""
    from devtools.console import SetupError
    from devtools.server import port_in_use

    if options.command == "bench":
        names = sorted(
            path.stem
            for path in (ROOT / "benchmarks").glob("*.py")
            if not path.stem.startswith("_")
        )
        if options.name not in names:
            there = ", ".join(names) or "none yet"
            raise SetupError(f"no benchmark named {options.name!r}; there are: {there}")
    if options.command == "serve":
        if not 0 < options.port < 65536:
            raise SetupError(f"--port {options.port} is no port; choose one from 1 to 65535")
        if port_in_use(options.port):
            raise SetupError(f"port {options.port} is taken; choose another with --port")


def main(argv=None):
    options, more = arguments(sys.argv[1:] if argv is None else argv)
    from devtools.console import SetupError
    from devtools.environment import Setup, check_python
    from devtools.server import ServerError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        check_python(sys.version_info)
        check(options)
        comfyui = os.environ.get("COMFYUI_PATH")
        environment = Setup(ROOT, comfyui, options.python, options.packages).prepare()
        return COMMANDS[options.command](environment, options, more)
    except (SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
