import numpy as np
import pytest

from aecore.data.members import Members

CONTENTS = [b"first", b"", b"third", bytes(range(200))]


def test_members_are_the_contents_they_were_made_of():
    members = Members.of(CONTENTS)
    assert list(members) == [members[row] for row in range(len(members))] == CONTENTS
    assert list(members[1:3]) == CONTENTS[1:3]
    assert list(members.take(np.array([3, 0, 0]))) == [CONTENTS[3], b"first", b"first"]
    assert list(Members.of([])) == []


def test_joined_members_stand_part_after_part():
    members = Members.of(CONTENTS)
    assert list(Members.joined([members.take(np.array([2, 1])), members, members[3:]])) == [b"third", b"", *CONTENTS, CONTENTS[3]]
    assert Members.joined([members]) is members


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        Members.of(CONTENTS)[4]
