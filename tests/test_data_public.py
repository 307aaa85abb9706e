"""The public data sets: tiny files of the official formats, every way they can be damaged, downloads from a server in
this process, and the real files where they are present (LVRPO_DATA, else ../shared/data)."""

import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import every_sentence, strip, write_nlvr, write_shapes
from PIL import Image

import data

REAL = Path(os.environ.get("LVRPO_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()


# ---------------------------------------------------------------- tiny files of the official formats


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(root, pictures, labels, prefix="train"):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
    (root / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


RED, GREEN, BLUE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
ROWS = [
    {"sentence": "a tower", "label": "true", "identifier": "7-0", "directory": "3", "evals": {"r0": "false"}},
    {"sentence": "no tower .", "label": "false", "identifier": "7-1"},
]


@pytest.fixture
def tiny(tmp_path):
    """A good data folder: 3 pieces of clothing, 2 SHAPES questions, 2 NLVR rows."""
    write_fashion(tmp_path / "fashion_mnist", np.zeros((3, 28, 28)), np.array([9, 0, 5]))
    write_shapes(tmp_path / "shapes", np.zeros((2, 30, 30, 3), np.uint8), ["is a circle red"] * 2, ["true", "false"])
    write_nlvr(tmp_path / "nlvr", ROWS)
    return tmp_path


def test_fashion_pictures_are_grey_and_centred_in_two_black_pixels(tmp_path):
    grey = np.random.default_rng(0).integers(1, 256, (3, 28, 28))
    write_fashion(tmp_path, grey, np.array([9, 0, 5]), prefix="t10k")
    pictures, labels = data.load_fashion_mnist(str(tmp_path), "test")
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [9, 0, 5]
    for channel in range(3):
        assert (pictures[:, 2:30, 2:30, channel] == grey).all()
    assert pictures.sum() == 3 * grey.sum()  # so everything around the 28x28 is black


def test_fashion_classes_are_ten_different_lower_case_words():
    assert len(set(data.FASHION_CLASSES)) == 10
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", word) for word in data.FASHION_CLASSES)
    assert (data.FASHION_CLASSES[0], data.FASHION_CLASSES[9]) == ("t-shirt", "boot")


def test_shapes_pictures_turn_from_blue_green_red_to_red_green_blue(tmp_path):
    stored = np.zeros((2, 30, 30, 3), np.uint8)
    stored[0, 0, 0], stored[1, 29, 29] = (10, 20, 30), (0, 0, 255)
    write_shapes(tmp_path, stored, ["is a circle red", "is red a square"], ["false", "true"])
    pictures, questions, answers = data.load_shapes(tmp_path, "val")
    assert pictures.shape == (2, 32, 32, 3) and pictures.dtype == np.uint8
    assert pictures[0, 1, 1].tolist() == [30, 20, 10] and pictures[1, 30, 30].tolist() == [255, 0, 0]
    assert pictures.sum() == stored.sum()
    assert questions == ["is a circle red", "is red a square"]
    assert answers.dtype == bool and answers.tolist() == [False, True]


@pytest.mark.parametrize("split", data.SHAPES_SPLITS)
def test_every_shapes_split_is_read_under_its_official_name(tmp_path, split):
    write_shapes(tmp_path, np.zeros((1, 30, 30, 3), np.uint8), ["is a circle red"], ["true"], split)
    assert len(data.load_shapes(tmp_path, split)[0]) == 1


def test_nlvr_boxes_are_cut_apart_before_they_shrink(tmp_path):
    write_nlvr(tmp_path, ROWS, pictures=[(RED, GREEN, BLUE), (BLUE, BLUE, RED)])
    (first, sentence, label), (second, _, other) = data.load_nlvr(tmp_path, "dev")
    assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8
    for box, color in zip([*first, *second], [RED, GREEN, BLUE, BLUE, BLUE, RED]):
        assert (box == color[:3]).all()  # not one pixel of a separator or of a neighbour
    assert (sentence, label, other) == ("a tower", True, False) and type(label) is bool


def test_nlvr_shrinking_averages_instead_of_dropping_thin_lines(tmp_path):
    write_nlvr(tmp_path, ROWS[:1])
    path = tmp_path / "dev/images/3/dev-7-0-0.png"
    picture = Image.new("RGB", (400, 100))
    picture.paste((255, 255, 255), (50, 0, 51, 100))  # one white column of 100
    picture.save(path)
    box = data.load_nlvr(tmp_path, "dev")[0][0][0]
    assert box.mean() == pytest.approx(255 / 100, rel=0.05)


def test_nlvr_reads_the_stated_order_of_boxes_and_else_the_first_there_is(tmp_path):
    rows = [dict(ROWS[0], permutation=4), ROWS[1]]
    for order, colors in ((2, (RED,) * 3), (4, (GREEN,) * 3)):
        write_nlvr(tmp_path, rows, "train", "train.examples.json", [colors] * 2, order)
    stated, first = data.load_nlvr(tmp_path, "train")
    assert stated[0][0, 0, 0].tolist() == [0, 255, 0] and first[0][0, 0, 0].tolist() == [255, 0, 0]


def test_nlvr_prefers_the_official_file_to_the_sample(tmp_path):
    write_nlvr(tmp_path, ROWS, file="dev.examples.json")
    write_nlvr(tmp_path, ROWS[:1])
    assert len(data.load_nlvr(tmp_path, "dev")) == 1


# ---------------------------------------------------------------- errors: one line, the file, found, expected, remedy

IMAGES, LABELS = "fashion_mnist/train-images-idx3-ubyte.gz", "fashion_mnist/train-labels-idx1-ubyte.gz"
NPY, OUTPUT = "shapes/shapes_dataset/val.input.npy", "shapes/shapes_dataset/val.output"
QUESTIONS = "shapes/shapes_dataset/val.query_str.txt"
ROWS_FILE, PNG = "nlvr/dev/dev.json", "nlvr/dev/images/3/dev-7-0-0.png"


def npy(array, **options):
    np.save(file := io.BytesIO(), array, **options)
    return file.getvalue()


def npz(array):
    np.savez(file := io.BytesIO(), array)
    return file.getvalue()


def png(size):
    strip((RED, GREEN, BLUE), size).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def row_lines(**change):
    """The second of two lines with its fields changed; None takes a field away."""
    row = {key: value for key, value in {**ROWS[1], **change}.items() if value is not None}
    return "\n".join(map(json.dumps, [ROWS[0], row])).encode()


FOLDER, GONE = "a folder in its place", "no file"
PICTURES_28, STORED = np.zeros((3, 28, 28)), np.zeros((2, 30, 30, 3), np.uint8)
DAMAGE = {  # name: (file, what stands there instead, what the message says)
    "images missing": (IMAGES, GONE, "found No such file"),
    "labels missing": (LABELS, GONE, "found No such file"),
    "folder for images": (IMAGES, FOLDER, "found Is a directory"),
    "not gzip": (IMAGES, b"<html>", "found BadGzipFile.*expected a gzip file"),
    "gzip cut short": (IMAGES, gzip.compress(idx(PICTURES_28))[:-9], "found EOFError.*expected a gzip file"),
    "gzip altered": (LABELS, gzip.compress(idx(np.arange(3)))[:-8] + bytes(8), "found BadGzipFile: CRC"),
    "empty gzip": (LABELS, gzip.compress(b""), "magic number 0x00000000, expected 0x00000801"),
    "labels for images": (IMAGES, gzip.compress(idx(np.arange(3))), "magic number 0x00000801, expected 0x00000803"),
    "images for labels": (LABELS, gzip.compress(idx(PICTURES_28)), "magic number 0x00000803, expected 0x00000801"),
    "other picture size": (IMAGES, gzip.compress(idx(np.zeros((3, 9, 8)))), r"found pictures of \[9, 8\]"),
    "pixels missing": (IMAGES, gzip.compress(idx(PICTURES_28)[:-1]), r"found 2367 bytes, expected 16 \+ 3 x 784"),
    "bytes too many": (LABELS, gzip.compress(idx(np.arange(3)) + b"\0"), r"found 12 bytes, expected 8 \+ 3 x 1"),
    "fewer labels": (LABELS, gzip.compress(idx(np.arange(2))), "found 2 labels, expected one for each of 3 pictures"),
    "label 10": (LABELS, gzip.compress(idx(np.array([0, 10, 1]))), "found label 10, expected 0 to 9"),
    "npy missing": (NPY, GONE, "found No such file"),
    "folder for npy": (NPY, FOLDER, "found Is a directory"),
    "npy cut short": (NPY, npy(STORED)[:-1], "found ValueError"),
    "npy empty": (NPY, b"", "found EOFError"),
    "npy with pickles": (NPY, npy(np.array([{}]), allow_pickle=True), "found ValueError: Object arrays"),
    "npz for npy": (NPY, npz(STORED), "found TypeError|found KeyError"),
    "npy of one number": (NPY, npy(np.uint8(1)), "found IndexError"),
    "npy of floats": (NPY, npy(STORED.astype(np.float32)), r"found float32 .*, expected an .npy array of uint8"),
    "npy of another shape": (NPY, npy(STORED[:, :28]), r"found uint8 \(2, 28, 30, 3\), expected"),
    "npy without pictures": (NPY, npy(STORED[:0]), r"found uint8 \(0, 30, 30, 3\), expected"),
    "questions missing": (QUESTIONS, GONE, "found No such file"),
    "fewer questions": (QUESTIONS, b"is a circle red\n", "found 1 lines, expected 2"),
    "questions not UTF-8": (QUESTIONS, b"\xff\xfe\n\n", "found UnicodeDecodeError.*expected UTF-8"),
    "more answers": (OUTPUT, b"true\nfalse\ntrue\n", "found 3 lines, expected 2"),
    "answer yes": (OUTPUT, b"true\nyes\n", "found the answer 'yes', expected true or false"),
    "rows missing": (ROWS_FILE, GONE, "found No such file"),
    "rows not JSON": (ROWS_FILE, b"{}}", "JSONDecodeError.* in line 1"),
    "rows empty": (ROWS_FILE, b"", "JSONDecodeError.* in line 1"),
    "row not an object": (ROWS_FILE, b"[1]", "TypeError.* in line 1"),
    "row without sentence": (ROWS_FILE, row_lines(sentence=None), r"KeyError\('sentence'\) in line 2"),
    "row without label": (ROWS_FILE, row_lines(label=None), r"KeyError\('label'\) in line 2"),
    "row without identifier": (ROWS_FILE, row_lines(identifier=None), r"KeyError\('identifier'\) in line 2"),
    "row labelled maybe": (ROWS_FILE, row_lines(label="maybe"), r"KeyError\('maybe'\) in line 2"),
    "row with a number for a sentence": (ROWS_FILE, row_lines(sentence=5), "sentence is not text.* in line 2"),
    "row of an unknown picture": (ROWS_FILE, row_lines(identifier="8-0"), "found no dev-8-0-0.png.* line 2"),
    "picture missing": (PNG, GONE, "found no dev-7-0-0.png.* line 1"),
    "folder for picture": (PNG, FOLDER, "found Is a directory"),
    "picture unreadable": (PNG, b"GIF", "found UnidentifiedImageError"),
    "picture cut short": (PNG, png((400, 100))[:-60], "found OSError"),
    "picture of another size": (PNG, png((200, 50)), "found a picture of 200x50, expected 400x100"),
}
LOADERS = {
    "fashion_mnist": (data.load_fashion_mnist, "train"),
    "shapes": (data.load_shapes, "val"),
    "nlvr": (data.load_nlvr, "dev"),
}


def one_line(call, *arguments):
    """The message of the ValueError that a call ends in."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    getattr(caught.value.__cause__, "close", int)()  # an HTTPError holds its connection open
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_line_with_what_was_found_expected_and_to_do(tiny, name):
    file, instead, says = DAMAGE[name]
    load, split = LOADERS[file.split("/")[0]]
    root = tiny / file.split("/")[0]
    load(root, split)  # good before
    (tiny / file).unlink()
    if instead == FOLDER:
        (tiny / file).mkdir()
    elif instead != GONE:
        (tiny / file).write_bytes(instead)
    message = one_line(load, root, split)
    named = tiny / ("nlvr/dev/images" if "found no dev-" in says else file)
    assert message.startswith(f"{named}: found ") and ", expected " in message
    assert re.search(says, message), message
    assert message.endswith(f"; move {root} away and add --download, or put the official files at {root}")


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_data_set_says_both_ways_to_get_it(tmp_path, name):
    load, split = LOADERS[name]
    message = one_line(load, tmp_path / name, split)
    assert message.endswith(f"; add --download, or put the official files at {tmp_path / name}")


@pytest.mark.parametrize("name", LOADERS)
def test_an_unknown_split_is_told_the_legal_ones(tiny, name):
    load, split = LOADERS[name]
    message = one_line(load, tiny / name, "../" + split)
    assert f"'../{split}'" in message and f"{split}" in message.split("expected one of")[1]


# ---------------------------------------------------------------- downloads, from a server in this process


@pytest.fixture
def server(monkeypatch):
    """Where all addresses lead: answers `pages`, path -> body, (body, the length it claims) or what the handler shall do, all else
    with 404."""
    pages, over = {}, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        tests_end = over

        def do_GET(self):
            page = pages.get(self.path)
            if callable(page):
                return page(self)
            body, length = page if isinstance(page, tuple) else (page or b"", len(page or b""))
            self.send_response(404 if page is None else 200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in data.ADDRESSES:
        monkeypatch.setitem(data.ADDRESSES, name, f"http://127.0.0.1:{http.server_port}/{name}")
    yield pages
    over.set()
    http.shutdown()
    http.server_close()
    thread.join()


def tar(files, extra=None, kind=tarfile.SYMTYPE):
    """A .tar.gz of files and one extra member: a symbolic link out of the archive, or another kind."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        if extra:
            member = tarfile.TarInfo(extra)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    return packed.getvalue()


def packed_folder(source, prefix):
    return {f"{prefix}/{p.relative_to(source).as_posix()}": p.read_bytes() for p in source.rglob("*") if p.is_file()}


@pytest.fixture
def served_fashion(server, tmp_path, monkeypatch):
    source = tmp_path / "served"
    for prefix in ("train", "t10k"):
        write_fashion(source, np.zeros((3, 28, 28)), np.array([9, 0, 5]), prefix)
    for file in source.iterdir():
        server[f"/fashion_mnist/{file.name}"] = file.read_bytes()
        monkeypatch.setitem(data.FASHION_MD5, file.name, hashlib.md5(file.read_bytes()).hexdigest())
    return server


def test_downloaded_fashion_mnist_loads(served_fashion, tmp_path, capsys):
    data.download("fashion_mnist", tmp_path / "new" / "data")
    assert data.load_fashion_mnist(tmp_path / "new/data/fashion_mnist", "test")[1].tolist() == [9, 0, 5]
    assert [p.name for p in (tmp_path / "new/data").iterdir()] == ["fashion_mnist"]  # and no scratch folder
    assert "download train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_downloaded_archives_load_and_leave_the_rest_of_the_repository_out(server, tiny, tmp_path):
    extra = {"a-master/README.md": b"x", "a-master/exp_shapes/train.py": b"x", "a-master/exp_shapes/data/v.txt": b"v"}
    packed = packed_folder(tiny / "shapes", "a-master/exp_shapes") | extra
    server["/shapes"] = tar(packed, "a-master/exp_shapes/data", tarfile.DIRTYPE)  # GitHub lists folders too
    packed = tar(packed_folder(tiny / "nlvr", "b-master/nlvr") | {"b-master/nlvr2/dev.json": b"x"})
    server["/nlvr"] = (packed, None)  # without a Content-Length, as GitHub does
    new = tmp_path / "new"
    data.download("shapes", new)
    data.download("nlvr", new)
    assert len(data.load_shapes(new / "shapes", "val")[1]) == len(data.load_nlvr(new / "nlvr", "dev")) == 2
    assert sorted(p.name for p in (new / "shapes").iterdir()) == ["data", "shapes_dataset"]
    assert sorted(p.name for p in (new / "nlvr").iterdir()) == ["dev"]


def test_a_folder_with_files_is_never_written_to(tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    for name in data.ADDRESSES:
        data.download(name, tiny)  # no server is needed
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*")} == before


def test_an_empty_folder_is_filled(served_fashion, tmp_path):
    (tmp_path / "new/fashion_mnist").mkdir(parents=True)
    data.download("fashion_mnist", tmp_path / "new")
    assert len(list((tmp_path / "new/fashion_mnist").iterdir())) == 4


LAST = "/fashion_mnist/t10k-labels-idx1-ubyte.gz"  # the three others have arrived by then


@pytest.mark.parametrize("page, says", [
    (b"altered", "found MD5 .*, expected"),
    (None, "HTTP Error 404"),
    ((b"short", 50), "found 5 bytes, expected 50|IncompleteRead"),
])  # fmt: skip
def test_a_failed_download_is_one_line_and_leaves_nothing_behind(served_fashion, tmp_path, page, says):
    served_fashion[LAST] = page
    message = one_line(data.download, "fashion_mnist", tmp_path / "new")
    assert LAST in message and re.search(says, message), message
    assert message.endswith(f"put the official files at {tmp_path / 'new' / 'fashion_mnist'}")
    assert list((tmp_path / "new").iterdir()) == []


def says(status, body=b"", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def stalls(handler):
    says(200, b"\x1f\x8b", Content_Length="1000")(handler)
    handler.tests_end.wait(20)  # the client hangs up long before


def cuts(handler):
    says(200, b"\x1f\x8b", Content_Length="1000")(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing is a reset
    handler.connection.close()


def is_endless(handler):
    says(200)(handler)
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:  # the client has had enough
        handler.close_connection = True


SERVERS = {  # what a server does: (its answer, what the line says)
    "stalls": (stalls, "timed out"), "cuts": (cuts, "Connection reset|IncompleteRead"),
    "fails": (says(500), "HTTP Error 500"), "is busy": (says(503), "HTTP Error 503"), "forbids": (says(403), "HTTP Error 403"),
    "claims less": (says(200, b"more than that", Content_Length="4"), "found MD5 .*, expected"),
    "claims more": (says(200, b"less", Content_Length="400"), "found 4 bytes, expected 400|IncompleteRead"),
    "claims nonsense": (says(200, b"some", Content_Length="many"), "invalid literal|found MD5"),
    "sends a page": (says(200, b"<html>log in</html>"), "found MD5 .*, expected"), "sends nothing": (says(200), "found MD5 .*, expected"),
    "points to a file": (says(302, Location="file:///etc/passwd"), "not allowed|HTTP Error 302"),
    "points to itself": (says(302, Location="/fashion_mnist/t10k-labels-idx1-ubyte.gz"), "infinite loop"),
    "is endless": (is_endless, "found more than 200000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_misbehaves_is_one_line_that_names_the_file_and_leaves_nothing_behind(served_fashion, tmp_path, monkeypatch, name):
    served_fashion[LAST], found = SERVERS[name]
    monkeypatch.setattr(data, "STALLED", 0.2)
    monkeypatch.setattr(data, "DOWNLOAD_LIMIT", 200_000)
    message = one_line(data.download, "fashion_mnist", tmp_path / "new")
    assert LAST in message and re.search(found, message), message
    assert "; try again later, or put the official files at" in message and list((tmp_path / "new").iterdir()) == []


def test_a_download_that_is_interrupted_leaves_nothing_behind_and_can_be_repeated(served_fashion, tmp_path, handlers):
    def interrupts(handler):
        raise_in_main.set()
        handler.tests_end.wait(20)

    raise_in_main, good = threading.Event(), served_fashion[LAST]
    served_fashion[LAST] = interrupts
    main = threading.main_thread().ident

    def interrupt():
        raise_in_main.wait(20)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        data.download("fashion_mnist", tmp_path / "new")
    thread.join()
    assert list((tmp_path / "new").iterdir()) == []
    served_fashion[LAST] = good
    data.download("fashion_mnist", tmp_path / "new")
    assert len(list((tmp_path / "new/fashion_mnist").iterdir())) == 4


NOISE = np.random.default_rng(0).integers(0, 256, (9, 5000), np.uint8)  # so that packing does not shrink it
GOOD = {f"a-master/exp_shapes/data/{n}": bytes(NOISE[n]) for n in range(9)}
PACKED = tar(GOOD)


@pytest.mark.parametrize("page, says", [
    (None, "HTTP Error 404"),
    (b"<html>", "not a gzip file"),
    ((PACKED, len(PACKED) + 1), "expected|IncompleteRead"),
    (PACKED[:-4000], "ended before|unexpected end"),
    (PACKED[:-8] + bytes(8), "CRC"),
    (tar({"a-master/README.md": b"x"}), "found none of the folders exp_shapes/shapes_dataset, exp_shapes/data"),
    (tar(GOOD | {"a-master/exp_shapes/data/../../../../evil": b"x"}), "unsafe path .*evil"),
    (tar(GOOD | {"../evil": b"x"}), "unsafe path .*evil"),
    (tar(GOOD | {"..\\evil": b"x"}), "unsafe path .*evil"),
    (tar(GOOD | {"/tmp/evil": b"x"}), "unsafe path .*evil"),
    (tar(GOOD | {"a-master/exp_shapes/data/C:/evil": b"x"}), "drive name .*evil"),
    (tar(GOOD, "a-master/exp_shapes/data/evil"), "link.*evil"),
    (tar(GOOD, "a-master/exp_shapes/data/evil", tarfile.LNKTYPE), "link.*evil"),
    (tar(GOOD, "a-master/exp_shapes/data/evil", tarfile.FIFOTYPE), "link.*evil"),
    (tar(GOOD, "a-master/exp_shapes/data/evil", tarfile.CHRTYPE), "link.*evil"),
    (tar(GOOD | {"a-master/exp_shapes/data/0/evil": b"x"}), "exists|Not a directory"),
    (tar(GOOD | {f"a-master/exp_shapes/data/{'x' * 300}": b"x"}), "too long"),
])  # fmt: skip
def test_a_bad_archive_is_one_line_and_leaves_nothing_behind(server, tmp_path, page, says):
    server["/shapes"] = page
    message = one_line(data.download, "shapes", tmp_path / "deep" / "new")
    assert re.search(says, message), message
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "new"]


@pytest.mark.parametrize("limit, says", [(1000, "more than 1000 bytes"), (100_000, "over 100000 bytes at .*zeros")])
def test_neither_a_download_nor_what_it_unpacks_to_may_pass_the_limit(server, tmp_path, monkeypatch, limit, says):
    server["/shapes"] = tar(GOOD | {"a-master/exp_shapes/data/zeros": bytes(10**6)})  # the zeros pack to almost nothing
    monkeypatch.setattr(data, "DOWNLOAD_LIMIT", limit)
    assert re.search(says, one_line(data.download, "shapes", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_no_such_data_set_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(data.ADDRESSES, "nlvr", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert "put the official files at" in one_line(data.download, "nlvr", tmp_path)
    assert "expected one of fashion_mnist, shapes, nlvr" in one_line(data.download, "cifar", tmp_path)


# ---------------------------------------------------------------- the real files, against the facts published of them


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data at {REAL / name}: set LVRPO_DATA to a folder that holds {name}/")
    return REAL / name


@pytest.fixture(scope="module")
def fashion_train():
    return data.load_fashion_mnist(real("fashion_mnist"), "train")


def test_real_fashion_train_has_its_published_counts_order_and_brightness(fashion_train):
    pictures, labels = fashion_train
    assert pictures.shape == (60000, 32, 32, 3) and data.FASHION_CLASSES[labels[0]] == "boot"
    assert np.bincount(labels).tolist() == [6000] * 10
    share = np.bincount(pictures[:, 2:30, 2:30, 0].ravel(), minlength=256) / (60000 * 784)
    mean = share @ np.arange(256) / 255
    std = np.sqrt(share @ (np.arange(256) / 255 - mean) ** 2)
    assert (round(mean, 4), round(std, 4)) == (0.2860, 0.3530)


def test_real_fashion_test_is_balanced_whether_whole_or_in_part():
    pictures, labels = data.load_fashion_mnist(real("fashion_mnist"), "test")
    assert len(pictures) == len(labels) and len(labels) in (8000, 10000)
    assert (np.abs(np.bincount(labels) / len(labels) - 0.1) < 0.01).all()


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_the_real_fashion_train_files_have_the_checksums_a_download_is_held_to(kind):
    file = f"train-{kind}-ubyte.gz"
    assert hashlib.md5((real("fashion_mnist") / file).read_bytes()).hexdigest() == data.FASHION_MD5[file]


@pytest.mark.parametrize(
    "split, count, questions, true", [("train.tiny", 64, 1, 27), ("train.small", 640, 10, 195), ("val", 1024, 16, 394)]
)
def test_real_shapes_have_their_published_counts_and_majority(split, count, questions, true):
    pictures, asked, answers = data.load_shapes(real("shapes"), split)
    assert (len(pictures), len(asked), len(set(asked)), answers.sum()) == (count, count, questions, true)


def test_real_shapes_answers_agree_with_the_colours_only_in_rgb_order():
    """A question "is a red X ..." is false if nothing in the picture is red; that must hold in RGB and fail in BGR."""
    pictures, questions, answers = data.load_shapes(real("shapes"), "val")

    def contradictions(pictures):
        count = 0
        for index, color in enumerate(("red", "green", "blue")):
            present = ((pictures.argmax(-1) == index) & (pictures.max(-1) > 60)).any((1, 2))
            count += sum(answers[i] and color in questions[i] and not present[i] for i in range(len(answers)))
        return count

    assert contradictions(pictures) == 0 < contradictions(pictures[..., ::-1])


@functools.cache
def real_nlvr(split):
    return data.load_nlvr(real("nlvr"), split)


@pytest.mark.parametrize("split, count, true", [("dev", 989, 547), ("test", 990, 556), ("train", 1000, 587)])
def test_real_nlvr_has_its_published_counts_and_majority(split, count, true):
    examples = real_nlvr(split)
    if split == "train" and (REAL / "nlvr" / "train" / "train.json").exists():
        count, true = 12410, sum(label for *_, label in examples)  # the whole official file instead of the sample
    assert (len(examples), sum(label for *_, label in examples)) == (count, true)
    assert all(pictures.shape == (3, 32, 32, 3) for pictures, *_ in examples)


def test_real_nlvr_boxes_hold_the_items_of_their_structured_representation():
    """A box without an item is plain grey 211; one with items is not. Box by box, on the first 200 rows of dev."""
    examples = real_nlvr("dev")
    rows = (REAL / "nlvr" / "dev" / "dev.json").read_text().split("\n")
    for (pictures, sentence, _), line in zip(examples[:200], rows):
        row = json.loads(line)
        assert sentence == row["sentence"]
        assert [bool((box != 211).any()) for box in pictures] == [bool(items) for items in row["structured_rep"]]


# ---------------------------------------------------------------- what is made in their style, against the real


def test_every_official_shapes_question_is_one_that_can_be_made():
    for split in ("train.tiny", "train.small", "val"):
        assert set(data.load_shapes(real("shapes"), split)[1]) <= set(data.GRID_QUESTIONS)


def test_made_grids_look_like_real_ones():
    """Share of black, and mean and deviation of what is not, in every channel: real against made."""
    rng = random.Random(0)
    real_ones = data.load_shapes(real("shapes"), "val")[0]
    made = np.stack([data.render_grid(rng, data.sample_grid(rng)) for _ in range(1000)])
    for numbers in (lambda x: (x.max(-1) < 40).mean(), lambda x: x.mean((0, 1, 2)), lambda x: x[x.max(-1) > 40].std(0)):
        assert numbers(made) == pytest.approx(numbers(real_ones), rel=0.06)


def test_what_a_made_sentence_means_is_what_people_say_of_real_boxes():
    """On dev, whose boxes are also given as lists of items: of the sentences that can be made, 19 labels in 20 agree."""
    sentences, right = every_sentence(data.NLVR_ROWS, data.NLVR_SLOTS), []
    for line in (real("nlvr") / "dev" / "dev.json").read_text().strip().split("\n"):
        row = json.loads(line)
        if holds := sentences.get(" ".join(row["sentence"].lower().rstrip(". ").split())):
            boxes = [[data.Item(o["type"], o["color"].lower().replace("#0099ff", "blue"), o["size"], o["x_loc"], o["y_loc"]) for o in box]
                     for box in row["structured_rep"]]  # fmt: skip
            right.append(holds([sorted(box, key=lambda o: -o.y) for box in boxes]) == (row["label"] == "true"))
    assert len(right) > 400 and np.mean(right) > 0.95


def test_a_made_box_is_the_real_one_where_the_items_are_the_same():
    """Drawn from its list of items, a real box differs from the official picture by little more than its rounding."""
    examples = real_nlvr("dev")
    rows = (real("nlvr") / "dev" / "dev.json").read_text().strip().split("\n")
    for (pictures, *_), line in zip(examples[:100], rows):
        for picture, items in zip(pictures, json.loads(line)["structured_rep"]):
            items = [data.Item(o["type"], o["color"].lower().replace("#0099ff", "blue"), o["size"], o["x_loc"], o["y_loc"]) for o in items]
            assert np.abs(data.render_box(items).astype(int) - picture).mean() < 1


def test_no_reported_question_or_sentence_is_ever_trained_on():
    rng = random.Random(0)
    for source, task in ((data.Shapes(real("shapes")), "ask"), (data.NLVR(real("nlvr")), "judge")):
        asked = {e.prompt for e in source.splits["test"] + source.splits["val"]}
        trained = [source.example(rng, task, pool) for pool in ("paired", "prompted") for _ in range(1500)]
        assert not asked & {e.prompt for e in [*trained, *source.splits["train"]]}
        assert {e.answer for e in trained} >= {e.answer for e in source.splits["test"]}
