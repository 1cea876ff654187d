"""`aepipe`: every verb, its exit codes, and what a person reads when something is wrong."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli.arguments import Verb
from pipelines.cli.main import main
from pipelines.cli.verbs import VERBS
from pipelines.recipe.recipe import SECTIONS
from tests.aecore.data.tiny import encoded, image
from tests.processes import AEPIPE, run, started

HERE = "cluster.num_workers=0"
COUNTS = {"train": 166, "test": 34}  # the hash of the keys decides
SPRITES = ("source.num_samples=200", "splits.by=hash", "splits.test=0.2", "shards.max_samples=100", HERE)
TINY = ("model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=2", "train.global_batch=32", HERE)


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """Run a verb and return its standard output, or its message where a failure is expected."""
    capsys.readouterr()
    got = main(argv)
    output = capsys.readouterr()
    assert got == code, output.err
    return output.err if code else output.out


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a root with dataset, run and table, made by the single verbs."""
    root = tmp_path_factory.mktemp("walk")
    data, run, table = (str(root / name) for name in ("dataset", "run", "table"))
    assert main(["shard", "sprites", data, *SPRITES]) == 0
    assert main(["train", f"data={data}", f"out={run}", *TINY]) == 0
    assert main(["encode", run, data, table, HERE]) == 0
    return root


def test_the_help_imports_nothing_heavy() -> None:
    code = "import sys; from pipelines.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'ray', 'prefect', 'pydantic', 'pyarrow') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    verbs = "shard adopt train encode evaluate sample decode run submit show verify compare gc doctor list serve deploy demo"
    for verb in verbs.split():
        assert f"\n    {verb}" in output


def test_what_runs_no_model_starts_without_torch(walk: Path, tmp_path: Path) -> None:
    places = [str(walk / name) for name in ("dataset", "run", "table")]
    lines = [["shard", "sprites", str(tmp_path / "dataset"), *SPRITES, HERE], ["compare", places[0], places[0]]]
    lines += [[verb, place] for verb in ("show", "verify", "gc") for place in places]
    code = "import json, sys; from pipelines.cli.main import main\n"
    code += "for line in json.loads(sys.argv[1]): assert main(line) == 0 and 'torch' not in sys.modules, line"
    run([sys.executable, "-P", "-c", code, json.dumps(lines)], check=True)


@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_sharding_a_folder_of_images_imports_nothing_that_only_other_sources_or_files_need(ext: str, tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"images/a/{number}.{ext}").write_bytes(encoded(image(number), "PNG" if ext == "png" else "JPEG"))
    code = "import sys; from pipelines.cli.main import main\n"
    code += "assert main(['shard', *sys.argv[1:]]) == 0\nprint(*sys.modules)"
    lines = run([sys.executable, "-P", "-c", code, tmp_path / "images", tmp_path / "out", HERE], check=True).stdout.splitlines()
    arrays, tars = "arrays _arrayfile _arrayshapes _arrayvalues _inflate _npz", "webdataset _external_tars _tar_file _tar_samples _unpack"
    others = {f"aecore.data.sources.{name}" for name in f"sprites dataset _frames {arrays} {tars}".split()}
    decoder = () if ext == "jpg" else ("decode", "pixels")  # the report of a generation has means of JPEGs
    others |= {f"aecore.data.format.{name}" for name in (*decoder, "foreign", "tiff")}
    others |= {"aecore.data.write.adopt", "aecore.data.write.convert"}
    assert all(map(importlib.util.find_spec, others)), "a module has another name: change it here"
    assert sorted({*others, "PIL", "torch"} & {*lines[-1].split()}) == []


@pytest.mark.parametrize("verb", list(VERBS), ids=lambda verb: verb.name)
def test_the_help_of_a_verb_names_every_option_and_whether_it_reads_a_recipe(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb.name, "--help"])
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--json", "--debug", *(name for name, _ in verb.arguments if name.startswith("-"))):
        assert f"\n  {option}" in output
    assert ("--dry-run" in output) == verb.writes
    assert ("key.path=value sets any key of the recipe" in output) == verb.reads_recipe


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.reads_recipe], ids=lambda verb: verb.name)
def test_a_verb_without_a_recipe_refuses_every_override(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    words = [settings.get("choices", ["x"])[0] for name, settings in verb.arguments if not name.startswith("-")]
    message = printed(capsys, verb.name, *words, "train.epochs=3", code=2)
    assert f"`aepipe {verb.name}` reads no recipe, so 'train.epochs=3' would change nothing" in message


def test_every_stage_is_shown_and_verified(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("dataset", "dataset"), ("run", "run"), ("table", "table"), ("", "root")):
        shown = json.loads(printed(capsys, "show", str(walk / name), "--json"))
        assert shown["kind"] == kind
        assert printed(capsys, "verify", str(walk / name), "--read-data").startswith("ok\n")
    whole = json.loads(printed(capsys, "show", str(walk), "--json"))
    assert whole["dataset"]["samples"] == COUNTS
    assert whole["run"]["finished"]
    assert whole["table"]["rows"] == 200
    assert whole["table"]["lineage"]["checkpoint"]["sha256"] == whole["run"]["checkpoint_sha256"]
    checked = json.loads(printed(capsys, "verify", str(walk), "--read-data", "--json"))
    assert checked["table"]["rows"] == whole["table"]["rows"] == checked["dataset"]["samples"], "the names are those of show"
    assert (checked["dataset"]["read_data"], checked["table"]["read_data"]) == (True, True)
    assert "samples:" in printed(capsys, "show", str(walk / "dataset"))
    assert printed(capsys, "verify", str(walk / "table"), "--dataset", str(walk / "dataset")).startswith("ok\n")


def test_a_run_is_shown_with_the_means_of_its_last_epoch_counted_from_1(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads(printed(capsys, "show", str(walk / "run"), "--json"))["metrics"]
    lines = b"".join(path.read_bytes() for path in sorted((walk / "run/metrics").iterdir())).splitlines()
    rows = [row for row in map(json.loads, lines) if row["epoch"] == 1]
    total = sum(row["samples"] for row in rows)
    assert (metrics["epoch"], metrics["step"], metrics["samples"]) == (2, 12, total)
    assert metrics["loss"] == pytest.approx(sum(row["loss"] * row["samples"] for row in rows) / total)


def test_what_encoded_a_table_is_shown_as_lines(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "show", str(walk / "table"))
    assert "\n  encoded_by:\n    device: cpu" in shown
    assert "\n    versions:\n      decoder: " in shown
    assert "{" not in shown


def test_evaluate_gives_the_elbo_of_the_test_split(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(printed(capsys, "evaluate", str(walk / "run"), str(walk / "dataset"), "--json", HERE))
    assert result["num_samples"] == COUNTS["test"]
    assert result["elbo"] == pytest.approx(result["log_likelihood"] - result["kl"], rel=1e-5)
    assert "elbo" in printed(capsys, "evaluate", str(walk / "run"), str(walk / "dataset"), HERE)


def test_evaluate_adds_the_scores_that_are_asked_for_to_its_table(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "evaluate",
        str(walk / "run"),
        str(walk / "dataset"),
        "evaluate.probe=true",
        "evaluate.factors=true",
        "evaluate.dci=false",
        HERE,
    ]
    result = json.loads(printed(capsys, *argv, "--json"))
    lines = {line.split("  ")[1].strip(): line for line in printed(capsys, *argv).splitlines() if line.startswith("  ")}
    assert f"{result['probe']['linear']:.4f}" in lines["linear probe"]
    assert f"{result['probe']['knn']:.4f}" in lines["5-NN"]
    assert f"{result['disentanglement']['mig']:.4f}" in lines["MIG"]
    assert f"{result['disentanglement']['factor_vae']:.4f}" in lines["FactorVAE score"]
    assert "DCI disentanglement" not in lines
    assert lines["KL per dimension"].count(":") == 4
    checkpoint, dataset = (result["lineage"][name]["sha256"][:12] for name in ("checkpoint", "dataset"))
    assert checkpoint in lines["lineage"] and dataset in lines["lineage"]


def test_evaluate_draws_figures_and_says_which_it_left_out(walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    argv, out = ["evaluate", str(walk / "run"), str(walk / "dataset"), HERE], tmp_path / "figures"
    planned = json.loads(printed(capsys, *argv, "--figures", str(out), "--dry-run", "--json"))
    assert planned["figures"] == str(out) and not out.exists()
    text = printed(capsys, *argv, "--figures", str(out))
    assert "not drawn" in text and "manifold: the latent has 4 dimensions, a plane has 2" in text
    assert {"losses.png", "reconstructions.png", "prior_samples.png", "figures.json"} <= {path.name for path in out.iterdir()}
    found = json.loads(printed(capsys, *argv, f"evaluate.figures={out}", "--json"))["figures"]
    assert found["url"] == str(out) and "losses.png" in found["files"]


def test_samples_are_drawn_and_a_table_is_decoded(walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, table = str(walk / "run"), str(walk / "table")
    made = json.loads(printed(capsys, "sample", run, str(tmp_path / "a"), "num=5", "sample.seed=3", HERE, "--json"))
    assert (made["num"], made["latent_dim"], made["shape"], made["files"]) == (5, 4, [1, 32, 32], 7)
    assert "5 samples of shape [1, 32, 32], all there already" in printed(capsys, "sample", run, str(tmp_path / "a"), "num=5", "seed=3")
    assert "34 decoded latents of shape" in printed(capsys, "decode", run, table, str(tmp_path / "b"), "split=test", "images=0")
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.name[0] != ".") == ["decoded.json", "decoded.npz", "grid.png"]
    planned = json.loads(printed(capsys, "decode", run, table, str(tmp_path / "c"), "num=3", "--dry-run", "--json"))
    assert (planned["num"], planned["recipe"]["decode"]["num"]) == (3, 3)
    assert "would sample:" in printed(capsys, "sample", run, str(tmp_path / "c"), "--dry-run")
    assert not (tmp_path / "c").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, out = str(walk / "dataset"), str(walk / "run"), str(tmp_path / "out")
    sharding = json.loads(printed(capsys, "shard", "sprites", out, *SPRITES, "--dry-run", "--json"))
    assert sharding["samples"] == COUNTS
    training = json.loads(printed(capsys, "train", f"data={data}", f"out={out}", *TINY, "--dry-run", "--json"))
    assert (training["steps"], training["input_shape"], training["recipe"]["train"]["epochs"]) == (12, [1, 32, 32], 2)
    encoding = json.loads(printed(capsys, "encode", run, data, out, HERE, "--dry-run", "--json"))
    assert encoding["new_rows"] == 200
    evaluating = json.loads(printed(capsys, "evaluate", run, data, HERE, "--dry-run", "--json"))
    assert (evaluating["samples"], evaluating["model"], evaluating["recipe"]["evaluate"]["iwae"]) == (COUNTS["test"], "vae", 0)
    running = json.loads(printed(capsys, "run", "demo", f"out={out}", *SPRITES, "--dry-run", "--json"))
    assert running["stages"] == {"shard": f"{out}/dataset", "train": f"{out}/run", "encode": f"{out}/table"}
    assert printed(capsys, "train", f"data={data}", f"out={out}", *TINY, "--dry-run").startswith("would train:")
    assert not Path(out).exists()


def test_the_same_command_again_changes_nothing(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in walk.rglob("*") if path.is_file()}

    before = files()
    data, run = str(walk / "dataset"), str(walk / "run")
    assert "generation 1" in printed(capsys, "shard", "sprites", data, *SPRITES)
    assert "run/model: finished already, step 12; means of epoch 2: " in printed(capsys, "train", f"data={data}", f"out={run}", *TINY)
    assert "table generation 1: nothing new, 200 rows in 3 parts" in printed(capsys, "encode", run, data, str(walk / "table"), HERE)
    assert files() == before


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["train", "data=./x", "out=./y", "train.epoch=3"], 2, "unknown key 'train.epoch' (did you mean 'train.epochs'?"),
        (["train", "mnist_vea"], 2, "did you mean 'mnist_vae'?"),
        (["train", "mnist_vae"], 2, "data is missing: add data=..."),
        (["run", "mnist_vae", "out=./y", HERE], 2, "source.url is missing: add source.url=..."),
        (["shard", "{tmp}/no-such-folder", "{tmp}/out", HERE], 3, "no-such-folder"),
        (["shard", "sprites", "pipe:cat", HERE], 2, "would run a command"),
        (["shard", "sprites", "ftp://bucket/x", HERE], 2, "has the scheme 'ftp'"),
        (["train", "data={tmp}/none", "out={tmp}/y", HERE], 3, "holds no dataset"),
        (["encode", "{tmp}/none", "{walk}/dataset", "{tmp}/t", HERE], 3, "holds no trained model"),
        (["encode", "{tmp}/none", "{walk}/dataset", "{tmp}/t", HERE], 3, "`aepipe train RECIPE data=DATASET out={tmp}/none`"),
        (["evaluate", "{walk}/run", "{walk}/dataset", "evaluate.split=val", HERE], 3, "has no split 'val' (it has: train, test)"),
        (["evaluate", "{walk}/run", "{walk}/dataset", "evaluate.split=val", HERE], 3, "write evaluate.split=train, or another of these"),
        (["sample", "{walk}/run", "{tmp}/s", "label=3"], 2, "label=3, and model.kind=vae is not conditional"),
        (["sample", "{walk}/run", "{tmp}/s", "num=0"], 2, "sample.num"),
        (["sample", "{walk}/run", "{tmp}/s", "sample.nun=3"], 2, "unknown key 'sample.nun' (did you mean 'sample.num'?"),
        (["sample", "{walk}/run", "{tmp}/s", "nm=3"], 2, "unknown key 'nm' (did you mean 'num'?"),
        (["sample", "{walk}/run", "{tmp}/s", "label=heart"], 2, "label=heart, and model.kind=vae is not conditional"),
        (["sample", "{walk}/table", "{tmp}/s"], 3, "table is a latent table, expected a training run"),
        (["sample", "{walk}/run", "{tmp}/s", "cluster={kind: address, address: h:1}"], 2, "`aepipe sample` works in this process"),
        (["decode", "{walk}/run", "{walk}/dataset", "{tmp}/s"], 3, "dataset is a dataset, expected a latent table"),
        (["decode", "{walk}/run", "{tmp}/no.npy", "{tmp}/s"], 3, "no.npy"),
        (["decode", "{walk}/run", "{walk}/table", "{tmp}/s", "split=val"], 3, "has no split 'val'"),
        (["show", "{tmp}"], 3, "holds no dataset, run or table"),
        (["train", "data={walk}/dataset", "out={walk}/run", *TINY, "optim.lr=0.5"], 2, "optim.lr: there 0.001, asked 0.5"),
        (
            ["train", "data={walk}/dataset", "out={walk}/run", *TINY, "train.epochs=3"],
            2,
            "train.epochs: there 2, asked 3\nwrite to another URL, or use the values that are there; "
            "to train on from the weights of this run, add train.init_from={walk}/run and another out",
        ),
        (["shard", "sprites", "{walk}/dataset", *SPRITES, "shards.max_samples=50"], 2, "shards.max_samples: there 100, asked 50"),
        (["serve", "--cron", "* * * * *"], 2, "--cron needs a recipe"),
        (["shard", "{tmp}", "/proc/nothing/here", HERE], 3, "{tmp}"),
        (["shard", "sprtes", "{tmp}/out", HERE], 2, "no folder 'sprtes' here and no source kind of that name (did you mean 'sprites'?"),
        (["show", "{walk}/table", "nonsense.key=3"], 2, "`aepipe show` reads no recipe, so 'nonsense.key=3' would change nothing"),
        (["verify", "{walk}/table", "read_data=true"], 2, "`aepipe verify` reads no recipe, so 'read_data=true' would change nothing"),
        (["list", "models", "a=1", "b=2"], 2, "`aepipe list` reads no recipe, so 'a=1' 'b=2' would change nothing"),
        (["serve", "train.epochs=3"], 2, "`aepipe serve` has no recipe to change"),
        (
            ["shard", "sprites", "{tmp}/w1", "out={tmp}/w2", *SPRITES],
            2,
            "'{tmp}/w1' as an argument and '{tmp}/w2' as an override (out=...)",
        ),
        (
            ["shard", "sprites", "{tmp}/w1", "source={kind: folder, url: x}"],
            2,
            "source.kind is given twice: 'sprites' as an argument and 'folder'",
        ),
        (["shard", "{tmp}/raw", "{tmp}/w1", "source.url={tmp}/other"], 2, "source.url is given twice: '{tmp}/raw' as an argument"),
        (
            ["encode", "{walk}/run", "{walk}/dataset", "{tmp}/t", "run={tmp}/r", HERE],
            2,
            "as an argument and '{tmp}/r' as an override (run=...)",
        ),
        (["evaluate", "{walk}/run", "{walk}/dataset", "data={tmp}/d", HERE], 2, "as an argument and '{tmp}/d' as an override (data=...)"),
        (["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "optim.lr=.inf"], 2, "optim.lr is inf, expected a finite number"),
        (["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "train.val_split=nope", "--dry-run"], 3, "has no split 'nope'"),
        (["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "train.split=nope", "--dry-run"], 3, "has no split 'nope'"),
        (["verify", "{walk}/dataset", "--dataset", "{walk}/dataset"], 2, "is a dataset without a table: leave it out"),
        (["verify", "{walk}/run", "--dataset", "{walk}/dataset"], 2, "is a run without a table: leave it out"),
        (["verify", "{walk}", "--dataset", "{tmp}/none"], 3, "{tmp}/none holds no dataset"),
        (["verify", "{walk}/table", "--dataset", "{tmp}/none"], 3, "{tmp}/none holds no dataset"),
        (["verify", "{walk}", "--dataset", ""], 2, "--dataset is empty"),
        (
            ["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "pairs.by=label"],
            2,
            "pairs.by=label, pairs.k=random draws pairs, but model.kind=vae trains on single samples",
        ),
        (["run", "sprites_vae", "out={tmp}/y", "pairs.k=1", HERE], 2, "draws pairs, but model.kind=vae trains on single samples"),
        (
            ["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "model.kind=adagvae", "pairs.k=7", "--dry-run"],
            2,
            "pairs.k is 7, expected",
        ),
        (["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "model.kind=adagvae", "pairs.by=lable"], 2, "pairs.by is 'lable'"),
        (
            ["train", "data={walk}/dataset", "out={tmp}/y", *TINY, "pairs.k=two"],
            2,
            "pairs.k is 'two' (str), expected a valid integer or 'random' (",
        ),
        (["shard", "sprites", "/proc/nothing/here", *SPRITES], 4, "cannot write under /proc/nothing/here"),
    ],
)
def test_bad_input_ends_with_its_exit_code_and_one_message(
    argv: list[str], code: int, message: str, walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tmp": str(tmp_path), "walk": str(walk)}
    error = printed(capsys, *[word.replace("{tmp}", places["tmp"]).replace("{walk}", places["walk"]) for word in argv], code=code)
    assert message.replace("{tmp}", places["tmp"]).replace("{walk}", places["walk"]) in error
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("aepipe: ")], error


def test_a_model_on_pairs_trains_encodes_and_is_evaluated_like_any_other(
    walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table, data = str(tmp_path / "run"), str(tmp_path / "table"), str(walk / "dataset")
    trained = json.loads(printed(capsys, "train", f"data={data}", f"out={run}", *TINY, "model.kind=adagvae", "pairs.k=2", "--json"))
    assert {"elbo", "log_likelihood_x1", "kl_divergence_x2"} <= set(trained["metrics"])
    assert json.loads(printed(capsys, "encode", run, data, table, HERE, "--json"))["rows"] == 200
    scores = json.loads(printed(capsys, "evaluate", run, data, HERE, "--json"))
    assert scores["elbo"] == pytest.approx(scores["log_likelihood"] - scores["kl"])
    assert printed(capsys, "verify", table, "--read-data").startswith("ok")
    knobs = json.loads(printed(capsys, "list", "models", "--json"))["adagvae"]["knobs"]
    assert {"latent_dim", "beta", "likelihood", "averaging", "divergence"} <= set(knobs)


def test_a_prefect_server_that_does_not_answer_is_a_cluster_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    for argv in (["shard", "sprites", str(tmp_path / "out"), *SPRITES], ["serve", "demo", f"out={tmp_path}/out"]):
        assert "no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:1/api" in printed(capsys, *argv, code=5)
    assert not (tmp_path / "out").exists()


def test_a_usage_error_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    error = printed(capsys, "shard", "only-one", code=2)
    assert "the following arguments are required: DATASET\nusage: aepipe shard " in error
    assert error.endswith("SRC [SRC ...] DATASET [key=value ...]\n")


@pytest.mark.parametrize(
    ("words", "message", "usage"),
    [
        ("shard sprites ./s --jsn", "`aepipe shard` has no option --jsn: did you mean --json?", "DATASET [key=value ...]"),
        ("shard sprites ./s cluster.num_workers", "write key=value, as in cluster.num_workers=...", "DATASET [key=value ...]"),
        ("gc ./s --dry", "`aepipe gc` has no option --dry: did you mean --dry-run?", "URL"),
        ("show a b", "`aepipe show` takes no argument 'b'", "URL"),
        ("list modls", "invalid choice: 'modls'", "{models,backbones,sources,recipes,sections}"),
    ],
)
def test_a_word_without_a_place_ends_with_the_usage_of_its_verb(
    words: str, message: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = printed(capsys, *words.split(), code=2)
    assert message in error
    assert f"\nusage: aepipe {words.split()[0]} " in error and error.endswith(f" {usage}\n")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.metadata

    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"aepipe {importlib.metadata.version('aecore')}\n"


@pytest.mark.parametrize(
    ("argv", "code", "kind", "message"),
    [
        (["show", "{tmp}/nope"], 3, "DataError", "holds no dataset, run or table"),
        (["train", "data=x", "out=y", "train.epoch=3"], 2, "ConfigError", "unknown key 'train.epoch'"),
        (["show"], 2, "ConfigError", "the following arguments are required: URL"),
    ],
)
def test_with_json_an_error_is_json_too(
    argv: list[str], code: int, kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(word.replace("{tmp}", str(tmp_path)) for word in argv), "--json"]) == code
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert (found["error"], found["exit_code"]) == (kind, code)
    assert message in found["message"]
    assert output.err == f"aepipe: {found['message']}\n", "people still read it"


def test_damage_is_found(walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(walk, tmp_path / "copy")
    tar = next((tmp_path / "copy" / "dataset").rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    assert printed(capsys, "verify", str(tmp_path / "copy" / "dataset")).startswith("ok"), "sizes are right"
    assert tar.name in printed(capsys, "verify", str(tmp_path / "copy" / "dataset"), "--read-data", code=3)
    tar.unlink()
    assert "is missing" in printed(capsys, "verify", str(tmp_path / "copy" / "dataset"), code=3)
    assert main(["verify", str(tmp_path / "copy" / "dataset"), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert tar.name in found["message"] and found["exit_code"] == 3
    table = tmp_path / "table"
    error = printed(capsys, "encode", str(walk / "run"), str(tmp_path / "copy" / "dataset"), str(table), HERE, code=3)
    assert error.endswith("the rest is kept; put that right, then run the same command again to finish\n")
    assert "\n\n" not in error
    weights = next((tmp_path / "copy" / "run" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert weights.name in printed(capsys, "verify", str(tmp_path / "copy" / "run"), code=3)


def test_a_root_is_checked_against_its_own_dataset_or_the_one_that_is_given(
    walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(walk, moved)
    assert main(["shard", "sprites", str(other), *SPRITES, "source.size=16", "splits.test=0.5"]) == 0
    assert printed(capsys, "verify", str(moved)).startswith("ok")
    assert printed(capsys, "verify", str(moved), "--dataset", str(walk / "dataset")).startswith("ok")
    assert "has 88 samples, the table covers 34" in printed(capsys, "verify", str(moved), "--dataset", str(other), code=3)
    shutil.rmtree(moved / "dataset")
    shutil.copytree(other, moved / "dataset")
    assert "has 88 samples" in printed(capsys, "verify", str(moved), code=3), "where it was encoded from does not count"
    shutil.rmtree(moved / "table")
    assert "is a root without a table" in printed(capsys, "verify", str(moved), "--dataset", str(other), code=2)


def test_a_bare_word_means_the_source_kind_also_beside_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert "generation 1" in printed(capsys, "shard", "sprites", "./sprites", *SPRITES)
    assert "train 166, test 34 samples" in printed(capsys, "shard", "./sprites", "./again", HERE), "the dataset that is there"
    same = ("out=sprites", "source.kind=sprites")
    assert "generation 1" in printed(capsys, "shard", "sprites", "./sprites", *same, *SPRITES), "the same value twice is no conflict"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_json_output_is_never_invalid(value: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.steps import steps

    monkeypatch.setitem(steps.STEPS, "evaluate", lambda *_, **__: {"elbo": value, "per": [{"mse": value}], "kl": 1.0})
    error = printed(capsys, "evaluate", "./run", "./data", "--json", HERE, code=3)
    assert f"elbo is {value}; per.0.mse is {value};" in error
    assert "Traceback" not in error


def test_a_folder_of_images_is_sharded_by_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for number, name in enumerate(("train/cat/1", "train/dog/1", "test/cat/2")):
        path = tmp_path / "raw" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number * 50).save(path)
    result = json.loads(printed(capsys, "shard", str(tmp_path / "raw"), str(tmp_path / "out"), "--json", HERE))
    assert (result["samples"], result["classes"]) == ({"train": 2, "test": 1}, 2)


@pytest.mark.parametrize("what", ["models", "backbones", "sources", "recipes", "sections"])
def test_list_names_what_there_is(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"models": "vae", "backbones": "mlp", "sources": "sprites", "recipes": "mnist_vae", "sections": "optim"}[what]
    parts = json.loads(printed(capsys, "list", what, "--json"))
    assert parts[known]["about"]
    assert f"{known}: " in printed(capsys, "list", what)
    if what == "recipes":
        assert [part["about"] for part in parts.values() if not part["about"].endswith(".")] == [], "whole sentences"
        assert parts["mnist_iwae"]["about"].endswith("(Burda et al. 2015).")


def test_list_says_every_key_of_a_recipe_with_its_meaning_and_the_steps_that_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    sections = json.loads(printed(capsys, "list", "sections", "--json"))
    assert list(sections) == list(SECTIONS)
    unclear = {f"{name}.{key}" for name, section in sections.items() for key, knob in section["knobs"].items() if not knob["help"]}
    assert not unclear
    assert sections["train"]["knobs"]["epochs"] == {"default": 10, "help": "passes over the split", "type": "int", "ge": 1}
    assert (sections["pairs"]["steps"], sections["shards"]["steps"]) == (["train"], ["shard", "adopt"])
    assert sections["cluster"]["steps"] == ["shard", "adopt", "train", "encode", "evaluate"]
    assert sections["optim"]["knobs"]["kind"]["choices"] == ["adam", "adamw"]
    assert sections["cluster"]["knobs"]["kind"]["choices"] == ["local", "address", "job"]
    text = printed(capsys, "list", "sections")
    assert re.search(r"\n\nencode: .*\(read by encode\)\n    batch = 512 +.*\(int >= 1\)\n", text)
    assert re.search(r"\n    val_split = null +.*\(str or null\)\n", text)
    assert "model: kind and knobs of the model, see `aepipe list models` (read by train)" in text


def test_one_of_a_thing_is_singular_and_small_data_has_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "shard", "sprites", str(tmp_path / "out"), "source.num_samples=1", "splits.by=none", HERE)
    assert re.search(r"generation 1: train 1 sample; 1 shard, [\d.]+ kB \(", text)


def test_list_says_what_each_knob_takes(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = json.loads(printed(capsys, "list", "models", "--json"))["vae"]["knobs"]
    assert (knobs["latent_dim"]["type"], knobs["latent_dim"]["ge"]) == ("int", 1)
    assert knobs["likelihood"]["choices"] == ["gaussian", "bernoulli", "laplace", "categorical"]
    assert "choices" not in knobs["beta"]
    assert re.search(r"\n    latent_dim = 10 +size of the latent vector \(int >= 1 and <= 16777216\)\n", printed(capsys, "list", "models"))
    folder = json.loads(printed(capsys, "list", "sources", "--json"))["folder"]["knobs"]
    assert (folder["extensions"]["type"], folder["frames"]["choices"]) == ("list of str", ["first", "all", "refuse"])


def test_without_a_terminal_progress_is_one_line_per_shard_and_epoch_on_standard_error(tmp_path: Path) -> None:
    command = [*AEPIPE, "shard", "sprites", str(tmp_path / "out"), "--json", *SPRITES]
    done = run(command, check=True)
    assert json.loads(done.stdout)["shards"] == 3
    assert sum("samples" in line and "train-0000" in line for line in done.stderr.splitlines()) == 2
    assert "\r" not in done.stderr


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(walk: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = [*TINY, "train.epochs=150", "checkpoint.every_steps=20"]
    command = [*AEPIPE, "train", f"data={walk}/dataset", f"out={out}", *long]
    with started(command) as process:
        process.wait_for(lambda: list(out.glob("checkpoints/*/checkpoint.json")), "its first checkpoint")
        process.send(signal.SIGINT)
        done = process.finish()
    assert done.returncode == 130, done.stderr
    assert "interrupted at step " in done.stderr
    assert "Traceback" not in done.stderr
    assert main(command[len(AEPIPE) :]) == 0
