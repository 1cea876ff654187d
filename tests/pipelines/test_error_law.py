"""A law over all verbs: whatever the operating system says to a file, a verb ends with an exit code of the table and without a traceback.

A new verb is in the law by being registered: its arguments are filled by their names, and by a dataset where the name is unknown.
"""

import errno
import os
import sys
import tarfile
from pathlib import Path

import pytest

from aecore import native
from aecore.store import _again as again_module
from pipelines.cli.arguments import Verb
from pipelines.cli.main import main
from pipelines.cli.verbs import VERBS
from tests.filefaults import CALLS, faults

CODES = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)
EXIT_CODES = {0, 4}  # it could do without, or the storage failed
WHEN = (0.0, 0.5, 0.9)  # how many of its calls succeed before: the fault comes while a verb opens, reads, commits
HERE = "cluster.num_workers=0"
SPRITES = ("source.num_samples=40", "splits.by=hash", "splits.test=0.2", "shards.max_samples=20", HERE)
TINY = ("model.latent_dim=2", "backbone.hidden=[8]", "train.epochs=1", "train.global_batch=16", HERE)
NOWHERE = "http://127.0.0.1:1"  # nothing answers there
MORE = {  # what a verb needs besides its positional arguments; those that would start a server only plan
    "shard": ("splits.by=hash", "splits.test=0.2", HERE),
    "train": ("data={root}/dataset", "out={out}", *TINY),
    "verify": ("--read-data",),
    "run": ("--dry-run",),
    "demo": ("--dry-run", "out={out}"),
    "deploy": ("--dry-run",),
    "submit": ("--no-wait", f"cluster.address={NOWHERE}"),
}
WRITES = ("open", "read", "write", "link", "fsync", "stat")
CALLS_OF = {  # operations that a verb makes at least
    **dict.fromkeys(("shard", "adopt", "train", "encode", "decode", "sample"), WRITES),
    **dict.fromkeys(("show", "verify", "compare", "evaluate"), ("open", "read")),
    "list": (),
    "demo": ("listdir",),
}
NEED_A_SERVICE = {"serve", "deploy", "submit"}  # none answers here


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a root with dataset, run and table, and a folder of images and a recipe beside them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("law")
    data, run, table = (str(root / name) for name in ("dataset", "run", "table"))
    assert main(["shard", "sprites", data, *SPRITES]) == 0
    assert main(["train", f"data={data}", f"out={run}", *TINY]) == 0
    assert main(["encode", run, data, table, HERE]) == 0
    for number in range(12):
        path = root / f"images/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    with tarfile.open(root / "tars.tar", "w") as tar:
        for path in sorted((root / "images").rglob("*.png")):
            tar.add(path, path.name)
    (root / "recipe.yaml").write_text(f"source: {{kind: sprites, num_samples: 40}}\nout: {root}/piped\ncluster: {{num_workers: 0}}\n")
    return root


def words(verb: Verb, root: Path, out: Path) -> list[str]:
    """Return the command line of a verb with all its positional arguments."""
    names = {name for name, _ in verb.arguments}
    values = {"src": root / "images", "run": root / "run", "latents": root / "table", "url": root, "out": out, "table": out}
    values |= {"src": root / "tars.tar"} if verb.name == "adopt" else {}
    values |= {"recipe": root / "recipe.yaml", "recipes": root / "recipe.yaml", "dataset": out if "src" in names else root / "dataset"}
    filled = [verb.name]
    for name, settings in verb.arguments:
        if not name.startswith("-"):
            filled.append(str(settings["choices"][0] if "choices" in settings else values.get(name, root / "dataset")))
    more = MORE.get(verb.name, (HERE,) if verb.reads_recipe else ())
    return filled + [word.format(root=root, out=out) for word in more]


def usual_calls(verb: Verb, operation: str, root: Path, out: Path) -> int:
    """Return how many calls of an operation a verb makes where nothing fails; it succeeds then."""
    with faults(root.parent, operation, errno.EIO, spared=sys.maxsize) as met:
        status = main(words(verb, root, out))
    assert (status == 0) != (verb.name in NEED_A_SERVICE), f"{verb.name} ends with {status} where nothing fails"
    return sys.maxsize - met.spared


def _prepare(monkeypatch: pytest.MonkeyPatch, verb: Verb, folder: Path) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)  # the compiled loops call the kernel themselves
    monkeypatch.setattr(again_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("AECORE_CACHE", str(folder / "cache"))
    if verb.name in NEED_A_SERVICE:
        monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")


@pytest.mark.parametrize("operation", list(CALLS))
@pytest.mark.parametrize("verb", list(VERBS), ids=lambda verb: verb.name)
def test_an_error_of_a_file_ends_a_verb_with_an_exit_code_and_without_a_traceback(
    verb: Verb, operation: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _prepare(monkeypatch, verb, tmp_path)
    usual = usual_calls(verb, operation, root, tmp_path / "usual")
    assert usual or operation not in CALLS_OF.get(verb.name, ("open",))
    turn = [each.name for each in VERBS].index(verb.name) + list(CALLS).index(operation)
    for number, when in enumerate(WHEN if usual else ()):
        code = CODES[(turn + number) % len(CODES)]  # over verbs and operations every code has its turn
        argv = words(verb, root, tmp_path / f"out-{number}")
        capsys.readouterr()
        with faults(root.parent, operation, code, spared=round(when * (usual - 1))) as met:
            status = main(argv)
        printed, said = capsys.readouterr()
        what = f"{' '.join(argv)}: {operation} failed {met.raised} of {usual} times with {os.strerror(code)}:\n{said}"
        assert met.raised, what
        assert status in EXIT_CODES, what
        assert "Traceback" not in said, what
        has_result = status == 0 or printed != ""  # the findings of `doctor` are a result whatever they are
        assert len([line for line in said.splitlines() if line.startswith("aepipe: ")]) == (not has_result), what


def test_what_cannot_be_removed_fails_nothing_that_was_committed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, table = (str(tmp_path / name) for name in ("dataset", "run", "table"))
    for argv in (
        ["shard", "sprites", data, *SPRITES],
        ["train", f"data={data}", f"out={run}", *TINY, "checkpoint.every_steps=1", "checkpoint.keep=1"],
        ["encode", run, data, table, HERE],
        ["verify", table, "--read-data"],
    ):
        with faults(tmp_path, "unlink", errno.EIO) as met:
            assert main(argv) == 0
        assert met.raised or argv[0] == "verify"
        if argv[0] == "train":
            assert "old checkpoints stay for now: cannot remove" in capsys.readouterr().err
