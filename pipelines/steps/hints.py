"""The next command for each situation that an error of `aecore` names (`aecore.errors.Hint`): the library itself knows no command line.

The command line puts it after the message, and a flow into the run's log. The error of a Ray job brings its hint along as JSON.
"""

from aecore.errors import AecoreError

HINTS = {
    "bad-sample": "`aepipe shard SRC DATASET shards.check=decode shards.max_bad={share}` puts damaged samples into a quarantine, and makes "
    "images alike with shards.mode=RGB (or L) and shards.resize=SIDE",
    "damaged-dataset": "`aepipe verify {url} --read-data` lists what is wrong",
    "disk-full": "`aepipe gc URL` finds what killed runs left",
    "is-checkpoint": "it is RUN of `aepipe encode RUN DATASET TABLE`",
    "is-dataset": "train on it with `aepipe train RECIPE data={url} out=RUN`, encode it with `aepipe encode RUN {url} TABLE`",
    "is-decoded": "look at it with `aepipe show {url}`",
    "is-figures": "look at it with `aepipe show {url}`",
    "is-run": "it is RUN of `aepipe encode RUN DATASET TABLE` and `aepipe evaluate RUN DATASET`",
    "is-samples": "look at it with `aepipe show {url}`",
    "is-table": "look at it with `aepipe show {url}`, which names its dataset and its run",
    "left-behind": "`aepipe gc {url} --unfinished --older-than 0s` removes all that the unfinished attempt left, its finished parts too",
    "needs-index": "`aepipe adopt SRC DATASET` makes an index without a copy (of compressed tars: `aepipe shard SRC DATASET`)",
    "no-dataset": "`aepipe shard SOURCE {url}` writes a dataset there, `aepipe adopt SOURCE {url}` an index of external tars",
    "no-factors": "`aepipe shard sprites DATASET` makes a dataset with known factors",
    "no-model": "`aepipe train RECIPE data=DATASET out={url}` trains one",
    "no-prior": "`aepipe decode RUN LATENTS OUT` decodes given latents",
    "no-table": "`aepipe encode RUN DATASET {url}` writes one",
    "other-checkpoint": "`aepipe show {url}` says which run that is",
    "shard-instead": "the command for that is `aepipe shard SRC DATASET`",
}


def for_users(error: AecoreError, *more: str | None) -> str:
    """Return the message of an error with the next command in place of what it says to users of the library, and `more` after it."""
    command, text = next_command(error), str(error)
    if command is not None and error.hint is not None:
        text = text.replace(str(error.hint.values.get("python", "")), "", 1)
    return "; ".join([text, *filter(None, (command, *more))])


def next_command(error: AecoreError) -> str | None:
    """Return what a user of the command line can do about an error; None if its message says it all."""
    if error.hint is None or error.hint.name not in HINTS:  # a hint of a newer version, from a Ray job
        return None
    try:
        return HINTS[error.hint.name].format(**error.hint.values)
    except (KeyError, IndexError):  # its values have other names there
        return None
