import numpy as np
import pytest

from aecore.native.bytes_column import BytesColumn

CONTENTS = [b"first", b"", b"third", bytes(range(200))]


def test_members_are_the_contents_they_were_made_of():
    members = BytesColumn.from_bytes(CONTENTS)
    assert list(members) == [members[row] for row in range(len(members))] == CONTENTS
    assert list(members[1:3]) == CONTENTS[1:3]
    assert list(members.take(np.array([3, 0, 0]))) == [CONTENTS[3], b"first", b"first"]
    assert list(BytesColumn.from_bytes([])) == []


def test_joined_members_stand_part_after_part():
    members = BytesColumn.from_bytes(CONTENTS)
    assert list(BytesColumn.concat([members.take(np.array([2, 1])), members, members[3:]])) == [b"third", b"", *CONTENTS, CONTENTS[3]]
    assert BytesColumn.concat([members]) is members


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        BytesColumn.from_bytes(CONTENTS)[4]
