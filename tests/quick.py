"""The tests of `make quick`: at most 90 s, and most faults. They get the marker `quick` by their file's name, whatever its folder.

Chosen are the laws that cost little in each room, and one chain in this process (shard, train, encode, evaluate, verify: test_cli.py).
Left out are services (Ray, Prefect, S3), processes that are killed at every fault point, ranks in processes, and training in earnest.
"""

from pathlib import Path

import pytest

# file -> words in the names of its tests that are left out
QUICK: dict[str, tuple[str, ...]] = {
    # imports between rooms, the search for secrets, the helpers of the tests
    "test_layers.py": (),
    "test_canary.py": (),
    # bytes, registry, commits
    "test_base.py": (),
    "test_cache.py": ("processes_share",),
    "test_fanout.py": (),
    "test_generations.py": (),
    "test_native.py": (),
    "test_registry.py": (),
    "test_threads.py": (),
    "test_subset.py": (),
    "test_store.py": ("killed",),
    "test_documents.py": ("flipped", "listing"),
    "test_printable.py": (),
    "test_private.py": (),
    # data
    "test_array_folders.py": (),
    "test_arrays.py": (),
    "test_bags.py": (),
    "test_external_tars.py": (),
    "test_job.py": ("killed",),
    "test_loader.py": (),
    "test_manifest.py": (),
    "test_bytes_column.py": (),
    "test_order.py": (),
    "test_pairs.py": (),
    "test_fast_path.py": ("few_descriptors",),
    "test_plan.py": (),
    "test_ragged.py": (),
    "test_refused.py": (),
    "test_record.py": ("keys_of_many_paths",),
    "test_shard.py": ("killed",),
    "test_sources.py": ("compiled_loops",),
    "test_stream.py": ("TestTraining",),
    "test_tar.py": (),
    "test_transform.py": (),
    "test_verify.py": (),
    # models and losses
    "test_ae.py": (),
    "test_backbones.py": (),
    "test_linear.py": (),
    "test_loss.py": (),
    "test_model.py": (),
    "test_model_laws.py": ("compile",),
    "test_optim.py": (),
    "test_vae.py": (),
    # tables and scores
    "test_encode.py": ("killed",),
    "test_generate.py": (),
    "test_probe.py": (),
    "test_scores.py": (),
    "test_table.py": (),
    # recipes and the command line
    "test_cli.py": ("ctrl_c", "figures"),
    "test_config.py": (),
    "test_job_main.py": (),
    "test_jobs.py": (),
    "test_progress.py": (),
    "test_session.py": (),
    "test_tail.py": (),
    "test_text.py": (),
}
SERVICES = {"slow", "ray", "prefect", "real", "long", "accept"}
FIXTURES = {"s3", "bad_s3", "s3_server", "s3_proxy", "two_workers", "head"}


def mark_quick(items: list[pytest.Item]) -> None:
    for item in items:
        left_out = QUICK.get(Path(item.path).name)
        needs_service = SERVICES & {mark.name for mark in item.iter_markers()} or FIXTURES & set(getattr(item, "fixturenames", ()))
        if left_out is not None and not needs_service and not any(word in item.nodeid for word in left_out):
            item.add_marker(pytest.mark.quick)
