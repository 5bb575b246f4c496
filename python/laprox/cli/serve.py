"""`laprox serve` and `laprox-server`: llama-server, with a KV cache that keeps only the entries that matter."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import laprox
from laprox import extras, hub


def server_path() -> Path:
    """Where the patched llama-server is.

    Raises:
        FileNotFoundError: This build has none.
    """
    path = Path(laprox.__file__).parent / "bin" / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} doesn't exist: laprox was built without its server. Build it with -DLAPROX_BUILD_SERVER=ON "
            "(in a checkout: scripts/build --server)"
        )
    return path


def serve(arguments: list[str]) -> None:
    """Become llama-server. Everything it needs it finds beside itself; the environment stays as it is.

    A known model's name after -m becomes its file; -hf, too, where this llama-server can't download itself.
    """
    program = server_path()
    command = [str(program), *with_local_model(arguments, downloads=has_https(program.parents[1]))]
    if os.name == "nt":  # has no exec, and looks for libraries in PATH
        os.environ["PATH"] = f"{program.parents[1] / 'lib'}{os.pathsep}{os.environ['PATH']}"
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(command[0], command)


def has_https(package: Path) -> bool:
    """Whether llama-server was built with a TLS library, which its `-hf` needs. Without one it carries the advice to rebuild."""
    for path in (*package.glob("bin/*"), *package.glob("lib/*llama-common*")):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
            if binary.find(b"HTTPS is not supported. Please rebuild") >= 0:
                return False
    return True


def with_local_model(arguments: list[str], downloads: bool) -> list[str]:
    """The arguments with a file where a known model's name was, and instead of -hf unless llama-server `downloads`.

    Raises:
        DownloadError, MissingExtra, ValueError, OSError: It can't be got; says why.
    """
    options: dict[str, str] = {}
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        option = _OPTIONS.get(argument)
        value = next(left, None) if option else None
        if option and value is not None and (option == "model" or not downloads):
            options[option] = value
        else:
            others += [argument] if value is None else [argument, value]
    if (model := options.get("model")) and hub.is_known(model):
        extras.need("cli", f"downloading {model}")
        from laprox.cli import downloading

        options["model"] = str(downloading.fetch(model))
    if repo := options.pop("repo", None):
        extras.need("cli", f"downloading {repo}")
        from laprox.cli import downloading

        path = downloading.fetch_from_repository(repo, options.pop("file", None), offline="--offline" in arguments)
        options["model"] = str(path)
    if "file" in options:
        raise ValueError(f"--hf-file {options['file']} needs the repository, too: -hf USER/MODEL")
    return [*(["-m", options["model"]] if "model" in options else []), *others]


_OPTIONS = {
    "-m": "model", "--model": "model",
    "-hf": "repo", "-hfr": "repo", "--hf-repo": "repo",
    "-hff": "file", "--hf-file": "file",
}  # fmt: skip


def main() -> None:
    """The `laprox-server` program."""
    try:
        serve(sys.argv[1:])
    except (extras.MissingExtra, OSError, ValueError, RuntimeError) as error:
        print(f"laprox-server: {error}", file=sys.stderr)
        sys.exit(1)
