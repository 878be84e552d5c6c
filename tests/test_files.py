"""Files are written whole or not at all."""

import resource

import pytest

from fastscore.files import atomic_write, remove_leftovers, write_bytes


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".wav"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_an_error_in_the_block_changes_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("encoder failed")

    with pytest.raises(RuntimeError, match="encoder failed"):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_no_space_is_one_sentence_and_leaves_no_debris(tmp_path):
    # a limit on file size fails a write the way a full disk does: half-way through
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*a\.bin.*free space"):
            write_bytes(tmp_path / "a.bin", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_names_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; create it"):
        write_bytes(tmp_path / "nowhere" / "a.bin", b"")
    with pytest.raises(ValueError, match="is a folder"):
        write_bytes(tmp_path, b"")


def test_removes_only_what_killed_writers_left(tmp_path):
    with atomic_write(tmp_path / "state.ckpt") as temporary:
        temporary.write_bytes(b"state")
        leftover = temporary.name
    kept = [".hidden", ".lock", ".state.ckpt", "state.ckpt"]
    for name in [leftover, *kept]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
