"""Files that shrink, go, or cannot be read in the middle of a run: an error that names them."""

import copy
import errno
import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sparse_gpt.data import document_starts, number_file
from sparse_gpt.data.loader import PackedDataset, TrainLoader, eval_batches
from sparse_gpt.data.number_file import NumberFile
from sparse_gpt.data.shards import open_data, verify
from sparse_gpt.errors import EXIT_FAILED, EXIT_USER_ERROR, TryAgain, UserError
from tests.data.fixtures import make_folder, random_documents
from tests.data.test_megatron import write_pair

DOCUMENTS = random_documents(0, 300)
FLAT = np.array([i for document in DOCUMENTS for i in [*document, 256]])
NUMBERS = np.repeat(np.arange(300), [len(document) + 1 for document in DOCUMENTS])
S = 64


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", {"train": DOCUMENTS, "val": DOCUMENTS[:30]})


@pytest.fixture
def descriptors():
    """How many this process has open."""
    gc.collect()
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def failing(monkeypatch):
    """`failing(path, number)`: reads of that file end with that error."""

    def fail(path, number):
        real, inode = os.preadv, os.stat(path).st_ino

        def preadv(descriptor, buffers, offset):
            if os.fstat(descriptor).st_ino == inode:
                raise OSError(number, os.strerror(number))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return fail


def test_cut_short_after_opening(folder):
    train = open_data(folder).split("train")
    os.truncate(folder / "train-00001.bin", 512)
    assert np.array_equal(train.read(0, 1256), FLAT[:1256])  # what is left of it is right
    with pytest.raises(UserError, match=r"data/train-00001\.bin was cut short .*up to 2000 .* 512"):
        train.read(0, train.n_tokens)
    assert np.array_equal(train.read(2000, 500), FLAT[2000:2500])


def test_boundaries_cut_short_after_opening(folder):
    data = open_data(folder)
    dataset = PackedDataset([(data, 1.0)], "train", S, 0, True)
    os.truncate(folder / "train.doc.npy", 136)
    for use in (dataset.sample, dataset.describe):
        with pytest.raises(UserError, match=r"train\.doc\.npy was cut short"):
            use(0)


def test_boundaries_written_anew_after_opening(folder):
    train = open_data(folder).split("train")
    for content in (bytes(8 * 301), np.arange(301, dtype="<u8").tobytes()[::-1]):
        with open(folder / "train.doc.npy", "r+b") as file:
            file.seek(-len(content), os.SEEK_END)
            file.write(content)
        with pytest.raises(UserError, match=r"train\.doc\.npy: the document boundaries have chang"):
            train.document_ids(0, train.n_tokens)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["train-00002.bin", "train.doc.npy"])
def test_a_disk_that_fails_in_the_middle(folder, failing, name, number):
    train = open_data(folder).split("train")
    failing(folder / name, number)
    assert np.array_equal(train.read(0, 2000), FLAT[:2000])
    read = train.document_ids if name == "train.doc.npy" else train.read
    said = rf"data/{name} cannot be read: {os.strerror(number)}; make sure"
    with pytest.raises(TryAgain, match=said):
        read(0, train.n_tokens)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_a_read_that_fails_is_for_the_next_start(folder, failing, monkeypatch, number):
    """Exit code 1, with which a supervisor starts again: nothing that was given is wrong."""
    train = open_data(folder).split("train")
    failing(folder / "train-00002.bin", number)
    with pytest.raises(TryAgain, match="cannot be read") as raised:
        train.read(0, train.n_tokens)
    assert raised.value.code == EXIT_FAILED
    monkeypatch.undo()
    assert np.array_equal(train.read(0, train.n_tokens), FLAT)


def test_a_stale_handle_is_opened_once_more(folder, monkeypatch):
    train = open_data(folder).split("train")
    real, opened, stale = os.preadv, os.open, set()

    def open_again(*args):
        stale.clear()
        return opened(*args)

    def preadv(descriptor, buffers, offset):
        if descriptor in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", open_again)
    file = train._shards[2]
    assert isinstance(file, NumberFile) and file._held is not None
    stale.add(file._held.number)
    assert np.array_equal(train.read(0, train.n_tokens), FLAT)
    assert not stale and file._held is not None
    path = folder / "train-00002.bin"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    stale.add(file._held.number)
    with pytest.raises(UserError, match=r"train-00002\.bin is not the file that was") as raised:
        train.read(0, train.n_tokens)
    assert raised.value.code == EXIT_USER_ERROR


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, EXIT_USER_ERROR) for number in (errno.ENOENT, errno.EACCES, errno.EPERM)),
        *((number, EXIT_FAILED) for number in (errno.EIO, errno.ESTALE, errno.EMFILE)),
    ],
)
def test_the_code_of_a_file_that_cannot_be_opened(folder, monkeypatch, number, code):
    """At first, and later, when it was there."""
    train = open_data(folder).split("train")

    def refuse(path, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"bin cannot be read") as raised:
        open_data(folder)
    assert raised.value.code == code
    with pytest.raises(TryAgain, match=r"cannot be read"):
        pickle.loads(pickle.dumps(train)).read(0, 1)  # noqa: S301


def test_a_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory") as raised:
        NumberFile(tmp_path, "u1")
    assert raised.value.code == EXIT_USER_ERROR


def test_a_disk_that_fails_at_opening_and_in_verify(folder, failing, monkeypatch):
    failing(folder / "train.doc.npy", errno.EIO)
    for use in (open_data, verify):
        with pytest.raises(UserError, match=r"data/train\.doc\.npy cannot be read: Input/output"):
            use(folder)
    monkeypatch.undo()
    failing(folder / "val-00000.bin", errno.EIO)
    with pytest.raises(UserError, match=r"data/val-00000\.bin cannot be read: Input/output error"):
        verify(folder)


def test_no_descriptor_left(folder, monkeypatch):
    def refuse(path, flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"train-00000\.bin cannot be read: Too many open files"):
        open_data(folder)


def test_short_reads_go_on(folder, monkeypatch):
    train = open_data(folder).split("train")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    assert np.array_equal(train.read(0, train.n_tokens), FLAT)
    assert np.array_equal(train.document_ids(0, train.n_tokens), NUMBERS)


def test_deleted_and_replaced_after_opening(folder):
    """Whoever has it open goes on with the old one."""
    train = open_data(folder).split("train")
    for path in folder.glob("train*.bin"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(bytes(len(content)))
    (folder / "train.doc.npy").unlink()
    assert np.array_equal(train.read(0, train.n_tokens), FLAT)
    assert np.array_equal(train.document_ids(0, train.n_tokens), NUMBERS)


def test_more_files_than_may_be_open(folder, monkeypatch, descriptors):
    monkeypatch.setattr(number_file, "MOST_OPEN", 2)
    number_file._opened.clear()
    before = descriptors()
    data = open_data(folder)
    train = data.split("train")
    for start in [0, 5000, 1000, 3000, 0, 7000]:
        assert np.array_equal(train.read(start, 1500), FLAT[start : start + 1500])
        assert np.array_equal(train.document_ids(start, 9), NUMBERS[start : start + 9])
        assert descriptors() == before + 2
    path = folder / "train-00004.bin"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"train-00004\.bin is not the file that was opened at fir"):
        train.read(4000, 1)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00004\.bin cannot be read: No such file"):
        train.read(4000, 1)
    del data, train
    assert descriptors() == before


def test_threads_share_files_that_open_and_close(folder, monkeypatch):
    monkeypatch.setattr(number_file, "MOST_OPEN", 2)
    train = open_data(folder).split("train")

    def look(seed):
        for start in np.random.default_rng(seed).integers(0, len(FLAT) - 1500, 300):
            assert np.array_equal(train.read(start, 1500), FLAT[start : start + 1500])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_another_process_has_them_too(folder, descriptors):
    """Pickled they are opened again; a fork shares them, and what it closes is its own."""
    before = descriptors()
    train = open_data(folder).split("train")
    pickled = pickle.loads(pickle.dumps(train))  # noqa: S301
    for other in (pickled, copy.deepcopy(train)):
        assert np.array_equal(other.read(0, len(FLAT)), FLAT)
        assert np.array_equal(other.document_ids(0, len(FLAT)), NUMBERS)
    del pickled, other
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()  # so that a fork has nothing to open again
    if (child := os.fork()) == 0:
        same = np.array_equal(train.read(0, len(FLAT)), FLAT)
        del train
        os._exit(0 if same and descriptors() <= before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(train.read(0, len(FLAT)), FLAT)


@pytest.mark.parametrize("every", [1, 3, 128])
def test_starts_of_any_spacing(tmp_path, monkeypatch, every):
    """Documents of one token, and one longer than what is read at once."""
    monkeypatch.setattr(document_starts, "_EVERY", every)
    monkeypatch.setattr(document_starts, "CHUNK", 3 * every)
    documents = [[]] * 400 + [[1] * 900] + [[2] * (i % 5) for i in range(500)]
    numbers = np.repeat(np.arange(901), [len(document) + 1 for document in documents])
    train = open_data(make_folder(tmp_path / "data", {"train": documents})).split("train")
    rng = np.random.default_rng(0)
    for start in [0, 399, 400, 1300, len(numbers) - 1, *rng.integers(0, len(numbers), 200)]:
        for n in (1, 2, 130, len(numbers)):
            n = min(n, len(numbers) - int(start))
            assert np.array_equal(train.document_ids(int(start), n), numbers[start : start + n])


def test_megatron_pairs(tmp_path, failing):
    prefix = tmp_path / "pair"
    write_pair(prefix)
    data = open_data(prefix, val_fraction=0.3)
    train, val = data.split("train"), data.split("val")
    last = val.read(0, val.n_tokens)
    os.truncate(tmp_path / "pair.bin", 100)
    assert len(train.read(0, 50)) == 50
    for split in (train, val):
        with pytest.raises(UserError, match=r"pair\.bin was cut short while it was in use"):
            split.read(0, split.n_tokens)
    write_pair(prefix)
    data = open_data(prefix, val_fraction=0.3)
    (tmp_path / "pair.bin").unlink()
    assert np.array_equal(data.split("val").read(0, len(last)), last)
    write_pair(prefix)
    failing(tmp_path / "pair.idx", errno.EIO)
    with pytest.raises(UserError, match=r"pair\.idx cannot be read: Input/output error"):
        open_data(prefix)


def test_the_loader_says_so(folder):
    """Of a thread that reads ahead, and in an evaluation; whoever asks again hears it again."""
    data = open_data(folder)
    train, val = (PackedDataset([(data, 1.0)], split, S, 0) for split in ("train", "val"))
    with TrainLoader(train, 4, prefetch=1).batches() as stream:
        next(stream)
        for path in folder.glob("*.bin"):
            os.truncate(path, 4)
        with pytest.raises(UserError, match=r"data/train-0000\d\.bin was cut short"):
            list(stream)
        with pytest.raises(UserError, match=r"was cut short"):
            next(stream)
    with pytest.raises(UserError, match=r"data/val-00000\.bin was cut short"):
        next(eval_batches(val, 4))


def test_slices(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(b"xx" + np.arange(5, dtype="<u4").tobytes())
    numbers = NumberFile(path, "<u4", 2)
    assert len(numbers) == 5 and len(numbers[3:3]) == len(numbers[4:2]) == len(numbers[9:]) == 0
    for where in (slice(None), slice(1, 3), slice(-1, None), slice(2, 99), slice(None, 0)):
        assert np.array_equal(numbers[where], np.arange(5)[where])
    assert numbers.part("u1", 0, 2)[:].tobytes() == b"xx"
