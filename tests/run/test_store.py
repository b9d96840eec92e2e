"""The HDF5 files: the layout of the reference, and errors for every damage."""

import fcntl
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsiflow.errors import EnvironmentFault, IntegrityError
from wsiflow.plan.geometry import Frame
from wsiflow.run import store
from wsiflow.run.store_params import StoreParams

FRAME = Frame("reference", 896, 672, 1.0, 0.243, 224, 224, 112, 112, 1, 1, 0, 0, 4, 3)
STRIPS = FRAME._replace(convention="centred", block_rows=7, block_cols=9)
RAW = StoreParams(kind="hdf5", compression="none", quality=90, part_tiles=4000)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, 448, 448, 3), dtype=np.uint8)
COORD = np.array([[c, 1, 224 * c - 112, 112, 448] for c in (1, 2, 3)])


def write_patches(path: Path, *, last: int = 3) -> None:
    with store.create_patches(path, FRAME, {"slide_id": "s", "versions": {"a": "1"}}, RAW) as writer:
        writer.add_group(1, COORD[:2], iter([(PIXELS[0], 0.0), (PIXELS[1], 0.5)]))
        writer.add_group(2, COORD[2:], iter([(pixels, 0.0) for pixels in PIXELS[2:last]]))


def tissue(rows: int, cols: int) -> np.ndarray:
    """Return pixels as smooth and as coloured as those of a stained slide, (rows, cols, 3)."""
    waves = [np.sin(np.add.outer(np.arange(rows) / a, np.arange(cols) / b)) for a, b in ((31, 17), (9, 23), (40, 11))]
    return np.stack([(170 + 60 * wave).astype(np.uint8) for wave in waves], axis=-1)


BLOCKS = [tissue(672, 1120), tissue(448, 448), tissue(896, 672)]


def write_strips(path: Path, params: StoreParams = RAW) -> None:
    with store.create_patches(path, STRIPS, {"slide_id": "s"}, params) as writer:
        writer.add_group(1, COORD[:2], iter([(BLOCKS[0], 0.0), (BLOCKS[1], 0.5)]))
        writer.add_group(2, COORD[2:], iter([(BLOCKS[2], 0.0)]))


@pytest.mark.parametrize("compression", ["none", "lzf", "gzip"])
def test_strips_come_back_as_written(tmp_path: Path, compression: str) -> None:
    """Blocks of different sizes keep every pixel, with plain h5py as well."""
    write_strips(tmp_path / "s.h5", RAW.model_copy(update={"compression": compression}))
    store.check_patches(tmp_path / "s.h5", {1: [(672, 1120), (448, 448)], 2: [(896, 672)]})
    with store.open_patches(tmp_path / "s.h5") as file:
        assert np.array_equal(store.patch_group(file, 1).block(1), BLOCKS[1])
        assert np.array_equal(store.patch_group(file, 1).block(0), BLOCKS[0])
        assert np.array_equal(store.patch_group(file, 2).block(0), BLOCKS[2])
    with h5py.File(tmp_path / "s.h5", "r") as file:
        lo, hi = file["t1/offset"][1:3]
        assert np.array_equal(file["t1/img"][lo:hi].reshape(*file["t1/size"][1], 3), BLOCKS[1])


def test_strips_as_jpeg_are_small_and_near(tmp_path: Path) -> None:
    """Quality 95 without chroma subsampling: a fraction of the bytes, a few grey levels away."""
    params = RAW.model_copy(update={"compression": "jpeg", "quality": 95})
    write_strips(tmp_path / "raw.h5")
    write_strips(tmp_path / "jpeg.h5", params)
    assert params.loss == "jpeg 95"
    assert RAW.loss == ""
    assert (tmp_path / "jpeg.h5").stat().st_size < 0.3 * (tmp_path / "raw.h5").stat().st_size
    with store.open_patches(tmp_path / "jpeg.h5") as file:
        again = store.patch_group(file, 1).block(0)
    assert again.shape == BLOCKS[0].shape
    assert 0 < np.abs(again.astype(int) - BLOCKS[0]).max() < 12


def test_planned_blocks_of_strips_are_checked(tmp_path: Path) -> None:
    """A file with a block of another size than planned is refused."""
    write_strips(tmp_path / "s.h5")
    with pytest.raises(IntegrityError, match="t1 holds other blocks"):
        store.check_patches(tmp_path / "s.h5", {1: [(672, 1120), (448, 449)], 2: [(896, 672)]})


@pytest.mark.parametrize("compression", ["none", "gzip", "jpeg"])
def test_a_flipped_bit_in_a_strip_is_an_error(tmp_path: Path, compression: str) -> None:
    """With any compression, one changed bit of the pixels is an error."""
    path = tmp_path / "s.h5"
    write_strips(path, RAW.model_copy(update={"compression": compression}))
    with h5py.File(path, "r") as file:
        chunk = file["t2/img"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(data)
    with store.open_patches(path) as file, pytest.raises(IntegrityError, match="block 0 cannot be read"):
        store.patch_group(file, 2).block(0)


def test_reference_readers_can_open_it(tmp_path: Path) -> None:
    """Plain h5py finds t<k>/img uint8 (n, 448, 448, 3) and t<k>/coord int64 (n, 5) with column before row."""
    write_patches(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert sorted(file) == ["t1", "t2"]
        assert file["t1/img"].dtype == np.uint8
        assert np.array_equal(np.array(file["t1"]["img"]), PIXELS[:2])
        assert file["t1/coord"].dtype == np.int64
        assert np.array(file["t2"]["coord"]).tolist() == [[3, 1, 560, 112, 448]]
        assert file["t1/transparent"][:].tolist() == [0.0, 0.5]
        assert file.attrs["slide_id"] == "s"
        assert '"um_px": 0.243' in file.attrs["frame"]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing in the file depends on when it was written."""
    write_patches(tmp_path / "a.h5")
    write_patches(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_planned_groups_are_checked(tmp_path: Path) -> None:
    """A file with every block passes; a file without a group or with an unwritten block does not."""
    write_patches(tmp_path / "good.h5")
    store.check_patches(tmp_path / "good.h5", {1: [(448, 448)] * 2, 2: [(448, 448)]})
    with pytest.raises(IntegrityError, match="1 were planned"):
        store.check_patches(tmp_path / "good.h5", {1: [(448, 448)] * 2})
    write_patches(tmp_path / "short.h5", last=2)
    with pytest.raises(IntegrityError, match="t2 was not written to its end"):
        store.check_patches(tmp_path / "short.h5", {1: [(448, 448)] * 2, 2: [(448, 448)]})
    with h5py.File(tmp_path / "good.h5", "r+") as file:  # pixels that were never written, of the planned shape
        form = {"shape": file["t2/img"].shape, "dtype": np.uint8, "chunks": file["t2/img"].chunks}
        del file["t2/img"]
        file["t2"].create_dataset("img", **form)
    with pytest.raises(IntegrityError, match="t2 holds other blocks than planned"):
        store.check_patches(tmp_path / "good.h5", {1: [(448, 448)] * 2, 2: [(448, 448)]})


def test_predictions_come_back_as_written(tmp_path: Path) -> None:
    """Scores and coordinates are read exactly as they were written."""
    prob = RNG.random((3, 2, 2), dtype=np.float32)
    store.write_predictions(tmp_path / "t1.h5", FRAME, COORD, prob, {"key": "k"})
    coord, again = store.read_predictions(tmp_path / "t1.h5")
    assert np.array_equal(coord, COORD)
    assert np.array_equal(again, prob)


def test_further_classes_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Each class comes back by its number; one that the file does not hold is an error."""
    prob, maps = RNG.random((3, 2, 2), dtype=np.float32), RNG.random((2, 3, 2, 2), dtype=np.float32)
    store.write_predictions(tmp_path / "t1.h5", FRAME, COORD, prob, {}, maps)
    for number, expected in enumerate((prob, *maps)):
        assert np.array_equal(store.read_predictions(tmp_path / "t1.h5", number)[1], expected)
    with pytest.raises(IntegrityError, match="the scores cannot be read"):
        store.read_predictions(tmp_path / "t1.h5", 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0000001, -1e-6])
def test_a_score_that_is_not_a_probability_is_refused(tmp_path: Path, value: float) -> None:
    """NaN, infinity and values outside [0, 1] are refused on reading."""
    prob = np.full((3, 2, 2), 0.5, dtype=np.float32)
    prob[1, 1, 1] = value
    store.write_predictions(tmp_path / "t1.h5", FRAME, COORD, prob, {})
    with pytest.raises(IntegrityError, match="not numbers in"):
        store.read_predictions(tmp_path / "t1.h5")


def test_no_flipped_bit_gives_other_numbers(tmp_path: Path) -> None:
    """Each of 200 single-bit flips in a predictions file is an error, or changes no value that is read."""
    path = tmp_path / "t1.h5"
    prob = RNG.random((3, 2, 2), dtype=np.float32)
    store.write_predictions(path, FRAME, COORD, prob, {"key": "k"})
    good = path.read_bytes()
    for position in RNG.integers(0, len(good), 200).tolist():
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(RNG.integers(8))
        path.write_bytes(damaged)
        try:
            coord, again = store.read_predictions(path)
        except IntegrityError:
            continue
        assert np.array_equal(coord, COORD)
        assert np.array_equal(again, prob)


def test_a_flipped_pixel_is_an_error(tmp_path: Path) -> None:
    """Pixels have checksums: one changed bit in the stored image is an error."""
    path = tmp_path / "s.h5"
    write_patches(path)
    data = bytearray(path.read_bytes())
    position = bytes(data).find(PIXELS[1].tobytes()[:64])
    data[position + 7] ^= 1
    path.write_bytes(data)
    with store.open_patches(path) as file:
        group = store.patch_group(file, 1)
        assert np.array_equal(group.block(0), PIXELS[0])
        with pytest.raises(IntegrityError, match="block 1 cannot be read"):
            group.block(1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    """A truncated file is refused."""
    write_patches(tmp_path / "s.h5")
    data = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(IntegrityError, match="not a whole HDF5 file"), store.open_patches(tmp_path / "cut.h5"):
        pass


def test_an_index_shows_all_parts_as_one_file(tmp_path: Path) -> None:
    """Links are relative: after the folder was moved, h5py reads all parts through the one file of the slide."""
    (tmp_path / "a/s").mkdir(parents=True)
    write_patches(tmp_path / "a/s/p1.h5")
    store.write_index(tmp_path / "a/s.h5", FRAME, {"slide_id": "s"}, {"s/p1.h5": [1, 2]})
    (tmp_path / "a").rename(tmp_path / "b")
    with store.open_patches(tmp_path / "b/s.h5") as index, store.open_patches(tmp_path / "b/s/p1.h5") as part:
        assert sorted(index) == ["t1", "t2"]
        assert np.array_equal(index["t2/img"][:], part["t2/img"][:])
        assert index.attrs["frame"] == part.attrs["frame"]


@pytest.fixture
def held_frames() -> Iterator[None]:
    """Another thread holds the frames of this thread's functions for a while, as profilers do."""
    worker, over, held = threading.get_ident(), threading.Event(), deque(maxlen=3)

    def hold() -> None:
        while not over.wait(0.0005):
            frame, values = sys._current_frames().get(worker), []
            while frame is not None:
                values.append(dict(frame.f_locals))
                frame = frame.f_back
            held.append(values)

    thread = threading.Thread(target=hold)
    thread.start()
    yield
    over.set()
    thread.join()


def test_equal_content_gives_equal_bytes_under_a_profiler(held_frames: None, tmp_path: Path) -> None:
    """The places of data sets in a file do not depend on when Python releases them."""
    pixels = np.random.default_rng(0).integers(0, 255, (300, 900, 3), dtype=np.uint8)
    written = set()
    for i in range(6):
        path = tmp_path / f"{i}.h5"
        with store.create_patches(path, FRAME._replace(block_rows=7), {"slide_id": "s"}, RAW) as writer:
            for k in range(1, 9):
                writer.add_group(k, np.zeros((3, 5), np.int64), iter([(pixels[k:], 0.0)] * 3))
        written.add(path.read_bytes())
    assert len(written) == 1


def test_cells_without_a_score_are_those_that_were_planned(tmp_path: Path) -> None:
    """A cell that is not scored is NaN; one that lacks its score, or has one too many, is refused."""
    scored = np.random.default_rng(0).random((3, 2, 2)) < 0.5
    prob, coord = np.where(scored, np.float32(0.5), np.nan).astype(np.float32), np.zeros((3, 5), np.int64)
    store.write_predictions(tmp_path / "t1.h5", FRAME, coord, prob, {"slide_id": "s"})
    assert np.array_equal(store.read_predictions(tmp_path / "t1.h5", 0, scored)[1], prob, equal_nan=True)
    for planned in (None, np.ones_like(scored), np.zeros_like(scored), scored[:2]):
        with pytest.raises(IntegrityError, match="not numbers in"):
            store.read_predictions(tmp_path / "t1.h5", 0, planned)


def test_files_are_written_without_locks(tmp_path: Path) -> None:
    """Files are written without locks, because not every file system has them."""
    with store.create_patches(tmp_path / "a.h5", FRAME, {}, RAW), (tmp_path / "a.h5").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_another_program_writes_is_not_to_be_deleted(tmp_path: Path) -> None:
    """A file that another program has open for writing is whole: the remedy is to close it there."""
    write_patches(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+", locking=False):  # a process may open what it has open itself
        shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    message = "another program has it open for writing; close it there"
    with pytest.raises(EnvironmentFault, match=message), store.open_patches(tmp_path / "b.h5"):
        pass


def test_an_unreadable_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy for a file that cannot be read now is not to delete it."""
    write_patches(tmp_path / "a.h5")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("unable to open file: name = 'a.h5', errno = 24, error message = 'Too many open files'")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(EnvironmentFault, match="ulimit -n"), store.open_patches(tmp_path / "a.h5"):
        pass
