"""The memory of a container is less than the machine's, in either version of control groups."""

from pathlib import Path

import pytest

from aecore.native import memory


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_is_the_memory_of_its_processes(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, free = memory.machine_bytes(), memory.free_bytes()
    assert 0 < free <= machine
    limit, used = tmp_path / "limit", tmp_path / "used"
    groups = (("/no/such/limit", "/no/such/use"), (str(limit), str(used)))
    monkeypatch.setattr(memory, "_GROUPS", groups if version == 1 else groups[::-1])
    limit.write_text(f"{1 << 20}\n")
    used.write_text("1000\n")
    assert (memory.machine_bytes(), memory.free_bytes()) == (1 << 20, (1 << 20) - 1000)
    used.write_text(f"{1 << 21}\n")
    assert memory.free_bytes() == 0
    limit.write_text("max\n" if version == 2 else f"{(1 << 63) - 4096}\n")  # no limit
    assert memory.machine_bytes() > 1 << 20
