"""Which clip is in which split, whose voice it is, and where Speech Commands comes from."""

import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
from speech_folders import TEST, VALIDATION, write_clip, write_folder

from fastscore import folders
from fastscore.folders import SpeechFolder, speech_commands, which_split

LABELS = ("one", "two", "three")


def names(folder: SpeechFolder) -> set[str]:
    return {clip.path.relative_to(folder.root).as_posix() for clip in folder.clips}


def test_official_lists(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    found = {split: SpeechFolder(root, split, LABELS) for split in ("train", "validation", "test")}
    for split, speaker in zip(found, "abc", strict=True):
        assert names(found[split]) == {
            f"{w}/{speaker}_nohash_{i}.wav" for w in LABELS for i in (0, 1)
        }
        assert found[split].speaker_disjoint
    assert names(SpeechFolder(root, "all", LABELS)) == set().union(*map(names, found.values()))


def test_label_subset_and_order(tmp_path: Path) -> None:
    folder = SpeechFolder(write_folder(tmp_path), "train", ("three", "one"))
    assert [(c.label, c.label_index, c.speaker) for c in folder.clips] == [
        ("one", 1, "a"),
        ("one", 1, "a"),
        ("three", 0, "a"),
        ("three", 0, "a"),
    ]
    assert len(folder) == 4


def test_same_splits_as_torchaudio(tmp_path: Path) -> None:
    from torchaudio.datasets import SPEECHCOMMANDS

    root = write_folder(tmp_path / "SpeechCommands" / "speech_commands_v0.02")
    write_clip(root / "_background_noise_" / "pink_noise.wav")
    for ours, theirs in (("train", "training"), ("validation", "validation"), ("test", "testing")):
        reference = SPEECHCOMMANDS(tmp_path, subset=theirs)
        rows = [reference.get_metadata(i) for i in range(len(reference))]
        clips = SpeechFolder(root, ours, LABELS).clips
        assert {(tmp_path / "SpeechCommands" / r[0], r[2], r[3]) for r in rows} == {
            (c.path, c.label, c.speaker) for c in clips
        }
        assert len(rows) == len(clips) == 6


def test_formats_and_strange_names(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    for name in ("a_nohash_2.flac", "a_nohash_3.OGG", "a_nohash_4.wav.wav"):
        write_clip(root / "one" / name)
    (root / "one" / "._a_nohash_0.wav").write_bytes(b"resource fork")
    (root / "one" / "notes.txt").write_text("not audio")
    write_clip(root / "one" / "unnamed.wav")
    with pytest.warns(UserWarning, match=r"1 audio files .* left out: one/unnamed\.wav"):
        folder = SpeechFolder(root, "train", ("one",))
    assert {p.split("_nohash_")[1] for p in names(folder)} == {
        "0.wav",
        "1.wav",
        "2.flac",
        "3.OGG",
        "4.wav.wav",
    }


def test_hash_is_that_of_speech_commands() -> None:
    assert {which_split(s) for s in VALIDATION} == {"validation"}
    assert {which_split(s) for s in TEST} == {"test"}
    shares = Counter(which_split(f"speaker{i}") for i in range(5000))
    assert shares["validation"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_without_lists_the_speaker_decides(tmp_path: Path) -> None:
    for speaker in (*VALIDATION, *TEST, "a", "c"):
        for take in range(2):
            write_clip(tmp_path / "one" / f"{speaker}_nohash_{take}.wav", 0.05)
    speakers = {}
    for split in ("train", "validation", "test"):
        folder = SpeechFolder(tmp_path, split, ("one",))
        assert folder.speaker_disjoint
        speakers[split] = {clip.speaker for clip in folder.clips}
    assert speakers["validation"] == set(VALIDATION)
    assert speakers["test"] == set(TEST)
    assert speakers["train"] == {"a", "c"}


def test_shared_speakers_are_reported(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    with open(root / "testing_list.txt", "a") as file:
        file.write("one/a_nohash_1.wav\n")
    with pytest.warns(UserWarning, match="1 of 3 speakers are heard in more than one split"):
        folder = SpeechFolder(root, "train", LABELS)
    assert folder.shared_speakers == {"a"}
    assert not folder.speaker_disjoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # all of it at once holds nothing out; and these two words share nobody
        assert not SpeechFolder(root, "all", LABELS).speaker_disjoint
        assert SpeechFolder(root, "train", ("two", "three")).speaker_disjoint


def test_lists_as_people_write_them(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    text = "\ufeff./one/b_nohash_0.wav\r\n\r\n  two/b_nohash_0.wav \r\nnine/b_nohash_0.wav\r\n"
    (root / "validation_list.txt").write_bytes(text.encode())
    with pytest.warns(UserWarning, match="speakers"):
        folder = SpeechFolder(root, "validation", LABELS)
    assert names(folder) == {"one/b_nohash_0.wav", "two/b_nohash_0.wav"}


def test_a_listed_file_that_is_missing_is_not_forgotten(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "one" / "c_nohash_0.wav").unlink()
    assert "one/c_nohash_0.wav" in names(SpeechFolder(root, "test", LABELS))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("one/c_nohash_0.wav", r"one/c_nohash_0\.wav is in both lists"),
        ("../elsewhere_nohash_0.wav", "not of the form LABEL/SPEAKER_nohash_TAKE"),
        ("c_nohash_0.wav", "not of the form"),
        ("one/c.wav", "not of the form"),
    ],
)
def test_broken_lists(tmp_path: Path, entry: str, message: str) -> None:
    root = write_folder(tmp_path)
    with open(root / "validation_list.txt", "a") as file:
        file.write(entry + "\n")
    with pytest.raises(ValueError, match=message):
        SpeechFolder(root, "train", LABELS)


def test_one_list_without_the_other(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "testing_list.txt").unlink()
    with pytest.raises(ValueError, match=r"validation_list\.txt is there without its counterpart"):
        SpeechFolder(root, "train", LABELS)


def test_binary_list(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "testing_list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"testing_list\.txt: not readable as UTF-8"):
        SpeechFolder(root, "train", LABELS)


def test_wrong_arguments(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    with pytest.raises(ValueError, match="'four' is unknown; available: one, three, two"):
        SpeechFolder(root, "train", ("one", "four"))
    with pytest.raises(ValueError, match="split 'dev' is unknown; choose one of train,"):
        SpeechFolder(root, "dev", LABELS)
    for labels in ("one", (), ("one", "one")):
        with pytest.raises(ValueError, match="list of one or more different names"):
            SpeechFolder(root, "train", labels)
    with pytest.raises(ValueError, match="no such folder"):
        SpeechFolder(root / "no", "train")
    (root / "testing_list.txt").write_text("")
    with pytest.raises(ValueError, match="split 'test' holds no clip of one"):
        SpeechFolder(root, "test", ("one",))


# Speech Commands


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SPEECH_COMMANDS_CLIPS", 18)


def write_archive(root: Path) -> Path:
    content = write_folder(root.parent / "content")
    root.mkdir()
    with tarfile.open(root / "speech_commands_v0.02.tar.gz", "w:gz") as tar:
        for path in sorted(content.iterdir()):
            tar.add(path, path.name)
    return root


@pytest.mark.usefixtures("small_corpus")
def test_speech_commands_from_an_archive(tmp_path: Path) -> None:
    root = write_archive(tmp_path / "root")
    folder = speech_commands(root)
    assert folder == root / "SpeechCommands" / "speech_commands_v0.02"
    assert len(SpeechFolder(folder, "test", LABELS)) == 6
    assert {p.name for p in root.iterdir()} == {"SpeechCommands", "speech_commands_v0.02.tar.gz"}
    (root / "speech_commands_v0.02.tar.gz").unlink()
    assert speech_commands(root, download=False) == folder


@pytest.mark.usefixtures("small_corpus")
def test_cut_off_archive_leaves_nothing(tmp_path: Path) -> None:
    root = write_archive(tmp_path / "root")
    archive = root / "speech_commands_v0.02.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot get Speech Commands"):
        speech_commands(root)
    assert list(root.iterdir()) == [archive]


def test_incomplete_corpus(tmp_path: Path) -> None:
    write_folder(tmp_path / "SpeechCommands" / "speech_commands_v0.02")
    with pytest.raises(ValueError, match="18 clips, but Speech Commands has 105829"):
        speech_commands(tmp_path, download=False)


def test_no_corpus_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"allow the download, or put .*tar\.gz"):
        speech_commands(tmp_path / "root", download=False)
    # nobody listens on this port: the download fails as it does without a network
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"cannot get Speech Commands \(.*\); put .*tar\.gz"
    ) as caught:
        speech_commands(tmp_path / "root")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# the recordings beside the checkout


def test_shared_recordings(shared_data: Path) -> None:
    sizes = {"digits-human": (2400, 300, 300), "digits-synth": (3510, 320, 700)}
    for name, expected in sizes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            splits = [SpeechFolder(shared_data / name, s) for s in ("train", "validation", "test")]
        assert tuple(map(len, splits)) == expected
        assert {clip.label_index for clip in splits[2].clips} == set(range(10))
        assert splits[0].speaker_disjoint == (name == "digits-synth")
    with pytest.warns(UserWarning, match="6 of 6 speakers"):
        assert len(SpeechFolder(shared_data / "digits-human", "test").shared_speakers) == 6
