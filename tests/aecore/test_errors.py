"""An error reaches another process whole: as JSON through a line of a job's log, as a value through Ray's actors."""

import importlib
import json
import pickle
from collections.abc import Iterator

import pytest

from aecore import errors
from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import PartFailure, attempt, collect
from aecore.data.format.decode import DecodeError
from aecore.data.sources._skipped import of_kind
from aecore.data.write.job import _pixel_notes
from aecore.errors import AecoreError, Hint, InputError, RunFailed, counted, from_json, to_json
from aecore.store._s3_client import Answered
from tests.test_layers import modules

for _name, _ in [*modules("aecore"), *modules("pipelines")]:
    if _name != "pipelines.cli.demo":
        importlib.import_module(_name)


def kinds(kind: type[AecoreError] = AecoreError) -> Iterator[type[AecoreError]]:
    for narrower in kind.__subclasses__():
        yield narrower
        yield from kinds(narrower)


MORE_THAN_A_MESSAGE = {DecodeError: ("format", "a message"), Answered: ("a message", "404")}
ALL = sorted(set(kinds()), key=lambda kind: kind.__name__)


def made(kind: type[AecoreError]) -> AecoreError:
    return kind(*MORE_THAN_A_MESSAGE.get(kind, ("a message",)))


@pytest.mark.parametrize("kind", ALL)
def test_every_error_travels_as_a_value_with_its_class_message_and_attributes(kind: type[AecoreError]) -> None:
    error = made(kind)
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (kind, "a message", vars(error))


@pytest.mark.parametrize("kind", ALL)
def test_every_error_travels_as_json_with_its_class_message_and_exit_code(kind: type[AecoreError]) -> None:
    there = from_json(json.loads(json.dumps(to_json(made(kind)))))
    assert type(there) is (kind if kind not in MORE_THAN_A_MESSAGE else kind.__base__)
    assert (str(there), there.exit_code) == ("a message", kind.exit_code)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_of_a_part_ends_the_job_as_the_class_it_has(kind: type[AecoreError]) -> None:
    class Task:
        stem = "part-0"

    def fail() -> PartFailure:
        raise made(kind)

    failure = attempt(fail, Task())
    with pytest.raises(AecoreError, match=f"part-0: {kind.__name__}: a message") as raised:
        collect(lambda make, tasks: iter([failure]), lambda: pytest.fail("no worker is needed"), [Task()])
    assert raised.value.exit_code == kind.exit_code
    assert isinstance(raised.value, kind if kind not in MORE_THAN_A_MESSAGE else kind.__base__ or kind)


@pytest.mark.parametrize("kind", [errors.RunFailed, errors.ConfigError, errors.DataError, errors.StoreError, errors.ClusterError])
def test_an_error_of_a_class_that_is_unknown_here_is_the_first_of_its_exit_code(kind: type[AecoreError]) -> None:
    assert type(from_json({"error": "OfANewerVersion", "message": "x", "exit_code": kind.exit_code})) is kind


def test_a_hint_travels_as_a_value_as_json_and_with_a_failed_part() -> None:
    error = errors.DataError("a message", hint=Hint("no-dataset", {"url": "/x"}))
    failure = PartFailure("part-0", "DataError", str(error), hint=error.hint)

    class Task:
        stem = "part-0"

    with pytest.raises(errors.DataError) as raised:
        collect(lambda make, tasks: iter([failure]), lambda: pytest.fail("no worker is needed"), [Task()])
    travelled = (pickle.loads(pickle.dumps(error)), from_json(json.loads(json.dumps(to_json(error)))), raised.value)
    assert [found.hint for found in travelled] == [error.hint] * 3


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ({"name": "no-dataset", "values": {"url": "/x"}, "severity": 3}, Hint("no-dataset", {"url": "/x"})),
        ({"name": "no-dataset"}, Hint("no-dataset")),
        ({"name": "no-dataset", "values": None}, Hint("no-dataset")),
        ({"values": {"url": "/x"}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_hint_of_another_version_is_read_as_far_as_it_is_known(hint: object, expected: Hint | None) -> None:
    error = from_json({"error": "DataError", "message": "x", "hint": hint})
    assert (type(error), str(error), error.hint) == (errors.DataError, "x", expected)


def test_an_error_that_nobody_planned_is_a_failed_run() -> None:
    assert type(from_json(to_json(ZeroDivisionError("x")))) is RunFailed
    assert to_json(InputError("x")) == {"error": "InputError", "message": "x", "exit_code": 3}


@pytest.mark.parametrize(
    ("what", "one", "many"),
    [
        ("tar(s)", "tar", "tars"),
        ("hidden file(s) or folder(s)", "hidden file or folder", "hidden files or folders"),
        ("file(s) with several pages or frames", "file with several pages or frames", "files with several pages or frames"),
        ("sample(s) that source.include does not match", "sample that source.include does not match", None),
    ],
)
def test_a_message_about_one_thing_is_in_the_singular(what: str, one: str, many: str | None) -> None:
    many = many or one.replace("sample", "samples")
    assert counted(1, one, many) == of_kind(1, what) == f"1 {one}"
    for number in (0, 2):
        assert counted(number, one, many) == of_kind(number, what) == f"{number} {many}"


def test_a_note_about_one_file_with_several_frames_is_in_the_singular() -> None:
    """A table of nouns made "1 file has several page or frames" of it."""
    (note,) = _pixel_notes([PartRecord("a", (), 1, detail={"first_frames": 1})], {})
    assert note.startswith("1 file has several pages or frames, of which the first was stored")
