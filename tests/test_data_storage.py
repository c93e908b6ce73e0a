"""Images from a bucket or a web server are those from a folder, whatever a network does to a request."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import re
import secrets
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
import runs
import tifffile
from PIL import Image

from fcmae.cli import main
from fcmae.data import storage
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images
from fcmae.data.rasters import Raster
from fcmae.data.source import BadImage
from fcmae.data.storage import Cache, CutShort, Storage, joined


def requires(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


web, bucket = requires("aiohttp"), requires("s3fs", "moto", "flask")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "BACKOFF_S", 0.001)
    yield
    runs.forget_accelerator()


def image(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, a list and a table of them, and shards."""
    root = tmp_path_factory.mktemp("served")
    for number in range(6):
        path = root / "photos" / "ab"[number % 2] / f"{number} ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    (root / "photos/.hidden").mkdir()
    (root / "photos/.hidden/x.png").write_bytes(b"")
    (root / "photos/notes.md").write_text("no image")
    (root / "list.txt").write_text("photos/a/0 ü.png\nphotos/b/1 ü.png\nshards/0.tar\n")
    (root / "table.csv").write_text("path,label\nphotos/a/0 ü.png,a\nphotos/b/1 ü.png,b\nshards/0.tar/1.png,b\n")
    for name in ("a", "b"):
        shutil.copytree(root / "photos" / name, root / "strays" / name)
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / f"shards/{shard}.tar", "w") as archive:
            for number in range(4):
                for suffix, content in ((".png", image(4 * shard + number)), (".cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(f"{number}{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    # A shard beside class folders is left out, and so is a folder of shards beside shards.
    shutil.copy(root / "shards/0.tar", root / "strays")
    shutil.copytree(root / "shards", root / "nested/more")
    shutil.copy(root / "shards/1.tar", root / "nested")
    shutil.copytree(root / "shards", root / "nested/.trash")
    # The pictures of a run are no images to learn from.
    shutil.copytree(root / "shards", root / "runs")
    shutil.copytree(root / "photos/a", root / "runs/first/reconstructions")
    (root / "runs/first/config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    (root / "runs/first/environment.json").write_text("[]")
    return root


class Handler(SimpleHTTPRequestHandler):
    """A folder over HTTP, with ranges and faults: what `faults` says happens to the first requests for a path."""

    faults: dict[str, list[str]] = {}  # noqa: RUF012
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.asked.append((self.path, self.headers.get("Range")))
        waiting = self.faults.get(self.path, [])
        fault = waiting.pop(0) if waiting and self.command == "GET" else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "slow":
            time.sleep(1)
        if path.is_dir() or not path.exists():
            super().do_GET() if self.command == "GET" else super().do_HEAD()
            return
        content, status = path.read_bytes(), 200
        total, found = len(content), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and fault != "whole":
            start, end = int(found[1]), int(found[2] or total - 1)
            content, status = content[start : end + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if path.name == "same-size.tar":
            self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        else:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            if fault == "cut":
                self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    Handler.faults, Handler.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """The folder in a bucket of an S3 server, which a process finds by the usual environment."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "images", str(path.relative_to(folder)))
        yield "s3://images"
    running.stop()


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to a server, or fails at those for objects by `faults`, one after the other."""

    protocol_version = "HTTP/1.1"
    faults: ClassVar[list[str]] = []
    behind = ""

    def handle_one(self) -> None:
        asks_object = self.command == "GET" and "list-type" not in self.path
        fault = self.faults.pop(0) if asks_object and self.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "slow":
            time.sleep(2)
        request = urllib.request.Request(self.behind + self.path, headers=dict(self.headers), method=self.command)
        try:
            answer: Any = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        kept = ("content-type", "content-range", "etag", "last-modified")
        size = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        for name, value in [
            *((n, v) for n, v in answer.headers.items() if n.lower() in kept),
            ("Content-Length", size),
        ]:
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = handle_one  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def faulty_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same bucket behind the proxy."""
    filesystem = pytest.importorskip("s3fs").S3FileSystem
    Proxy.faults, Proxy.behind = [], os.environ["AWS_ENDPOINT_URL"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{http.server_port}")
        filesystem.clear_instance_cache()
        yield s3
        filesystem.clear_instance_cache()
        http.shutdown()


def contents(images: Images) -> list[bytes]:
    found = []
    for i in range(len(images)):
        with images.open(i) as file:
            found.append(file.read())
    return found


def assert_same(found: Images, expected: Images) -> None:
    assert contents(found) == contents(expected)
    assert found.fingerprint() == expected.fingerprint() or type(expected.source) is not type(found.source)
    assert found.class_names == expected.class_names
    # Of other files a folder afar tells all that lie there.
    kinds = [[note for note in images.notes if "names are not those of" not in note] for images in (found, expected)]
    assert len(kinds[0]) == len(kinds[1])
    if expected.labels is not None:
        np.testing.assert_array_equal(found.labels, expected.labels)


# Sources


SOURCES = ["photos", "list.txt", "shards", "shards/*.tar", "shards/1.tar", "photos/*", "photos/[a]", "s*", "photos/**"]
LABELLED = ["photos", "table.csv", "shards", "shards/*.tar", "strays", "nested", "n*/*", "n*/*/*", "runs"]


@bucket
@pytest.mark.parametrize("source", SOURCES)
def test_images_in_a_bucket_are_those_in_a_folder(folder: Path, s3: str, source: str) -> None:
    assert_same(find_images([f"{s3}/{source}"]), find_images([str(folder / source)]))


@bucket
@pytest.mark.parametrize("source", LABELLED)
def test_labelled_images_in_a_bucket_are_those_in_a_folder(folder: Path, s3: str, source: str) -> None:
    assert_same(find_labelled(f"{s3}/{source}"), find_labelled(str(folder / source)))


@web
@pytest.mark.parametrize("source", ["shards", "shards/0.tar", "table.csv"])
def test_images_on_a_web_server_are_those_in_a_folder(folder: Path, server: str, source: str) -> None:
    if not source.endswith(".csv"):
        assert_same(find_images([f"{server}/{source}"]), find_images([str(folder / source)]))
    assert_same(find_labelled(f"{server}/{source}"), find_labelled(str(folder / source)))


def test_images_in_memory_are_found_as_any_others(folder: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/m/{path.relative_to(folder)}", path.read_bytes())
    for source in SOURCES:
        assert_same(find_images([f"memory://m/{source}"]), find_images([str(folder / source)]))
    for source in LABELLED:
        assert_same(find_labelled(f"memory://m/{source}"), find_labelled(str(folder / source)))


@web
def test_of_a_large_tiff_on_a_web_server_only_what_is_asked_for_is_read(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcmae.data.shards.MUCH", 1 << 16)
    monkeypatch.setattr("fcmae.data.storage.AT_ONCE", 1 << 12)
    values = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    (folder / "large").mkdir()

    def read(compression: str | None = None) -> int:
        """The bytes that a crop takes, which is right."""
        tifffile.imwrite(folder / "large/a.tif", values, tile=(64, 64), compression=compression)
        Handler.asked.clear()
        with find_images([f"{server}/large"]).open(0) as file:
            found = Raster(file, 1, [0.0]).read((100, 200, 50, 60)).values
        np.testing.assert_array_equal(found[0], values[100:150, 200:260])
        ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for path, part in Handler.asked if part and "a.tif" in path]
        return sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)

    assert 0 < read() < values.size // 4
    places = [asked for path, asked in Handler.asked if asked]
    assert len(places) == len(set(places))  # the header is read once, however often it is looked at
    # What Pillow unpacks it asks for as a whole.
    with find_images([f"{server}/large"]).open(0) as file:
        Handler.asked.clear()
        assert file.read() == (folder / "large/a.tif").read_bytes() and len(Handler.asked) == 1
    # What the cache has as a whole needs no server.
    cached = Storage(cache=Cache(folder.parent / "cache", 10**9))
    monkeypatch.setattr("fcmae.data.shards.MUCH", 1 << 24)
    images = find_images([f"{server}/large"], storage=cached)
    for is_asked in (True, False):
        Handler.asked.clear()
        with images.open(0) as file:
            assert file.read() == (folder / "large/a.tif").read_bytes()
        assert bool(Handler.asked) == is_asked
    monkeypatch.setattr("fcmae.data.shards.MUCH", 1 << 16)
    Handler.faults["/large/a.tif"] = ["503"] * 2  # for a while
    monkeypatch.setattr(storage, "TRIES", 2)
    monkeypatch.setattr(storage, "BACKOFF_S", 0.01)
    images = find_images([f"{server}/large"])
    with pytest.raises(BadImage, match="503"):
        images.open(0)
    Handler.asked.clear()
    with images.open(0) as file:
        assert file.read(4) == b"II*\0"
    assert all(asked for path, asked in Handler.asked[1:] if "a.tif" in path)  # after its size, parts
    Handler.faults["/large/a.tif"] = ["whole"]  # a server that knows no ranges
    assert read() > 0
    Handler.faults["/large/a.tif"] = ["whole"] * 3
    monkeypatch.setattr("fcmae.data.shards.MUCH", 1 << 24)
    read()


def test_a_pattern_of_class_folders_afar_is_refused_as_it_is_here(folder: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    for path in (folder / "photos").rglob("*.png"):
        fsspec.filesystem("memory").pipe_file(f"/p/{path.relative_to(folder)}", path.read_bytes())
    for place in ("memory://p", str(folder)):
        with pytest.raises(ValueError, match="give a folder with one sub-folder a class"):
            find_labelled(f"{place}/photos/*")


def test_here_and_afar_may_be_mixed(folder: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/mixed/z.png", image(9))
    (tmp_path / "list.txt").write_text(f"{folder}/photos/a/0 ü.png\nmemory://mixed/z.png\n")
    assert contents(find_images([str(tmp_path / "list.txt")])) == [image(0), image(9)]


@pytest.mark.parametrize(
    ("parent", "name", "expected"),
    [
        ("s3://b/lists", "../a/x.png", "s3://b/a/x.png"),
        ("s3://b/lists", "https://h/x.png?a=1", "https://h/x.png?a=1"),
        ("s3://b/lists", "x.tar/1.png", "s3://b/lists/x.tar/1.png"),
        ("file:///a/b", "../x.png", "file:///a/x.png"),
        ("/a/b", "../x.png", "/a/x.png"),
        ("/a/b", "s3://b/x.png", "s3://b/x.png"),
        ("https://h/lists", "/a/x.png", "https://h/a/x.png"),
        ("https://h/lists", "../../../evil/x.png", "https://h/evil/x.png"),
        ("s3://b", "/a/x.png", "s3://b/a/x.png"),
    ],
)
def test_names_in_a_list_start_where_it_lies(parent: str, name: str, expected: str) -> None:
    assert joined(parent, name) == expected


@pytest.mark.parametrize("find", [lambda url: find_images([url]), find_labelled])
def test_what_cannot_be_listed_is_an_error_that_names_it(find: Callable[[str], Images]) -> None:
    for url in ("memory://nowhere", "nonsense://x/y", "memory://nowhere/x.tar", "memory://nowhere/a.tar.gz"):
        with pytest.raises(ValueError, match=rf"data\.path: .*{re.escape(url)}"):
            find(url)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def absent(*args: object, **kwargs: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match=r"Install s3fs to access S3: pip install 'fcmae\[remote\]'"):
        find_images(["s3://bucket/photos"])


# Faults


@web
@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "slow"])
def test_a_request_that_fails_is_made_again(
    folder: Path, server: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.3)
    Handler.faults = {"/shards/0.tar": [fault, fault]}
    assert_same(find_images([f"{server}/shards/0.tar"]), find_images([str(folder / "shards/0.tar")]))
    Handler.faults = {"/photos/a/0%20%C3%BC.png": [fault, fault]}
    assert Storage().read(f"{server}/photos/a/0%20%C3%BC.png") == image(0)


@bucket
@pytest.mark.parametrize("fault", ["500", "503", "cut", "slow"])
def test_a_request_to_a_bucket_that_fails_is_made_again(
    faulty_s3: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = find_images([f"{faulty_s3}/shards/0.tar"])
    expected = contents(images)
    monkeypatch.setattr(storage, "TIMEOUT_S", 1.0)
    Proxy.faults[:] = [fault, fault]
    assert contents(images) == expected
    assert not Proxy.faults


@bucket
@pytest.mark.parametrize("fault", ["403", "404"])
def test_an_object_that_a_bucket_refuses_is_a_bad_image_at_once(faulty_s3: str, fault: str) -> None:
    images = find_images([f"{faulty_s3}/shards/0.tar"])
    Proxy.faults[:] = [fault] * 9
    with pytest.raises(BadImage, match=r"^it cannot be read: "):
        images.open(0)
    assert len(Proxy.faults) == 8


@web
@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [("500", "500", 5), ("404", "", 1), ("403", "403", 1), ("cut", "", 5), ("slow", "Timeout", 5)],
)
def test_a_request_that_keeps_failing_makes_a_bad_image(
    server: str, fault: str, reason: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = find_images([f"{server}/shards/0.tar"])
    if fault == "slow":
        monkeypatch.setattr(storage, "TIMEOUT_S", 0.1)
    Handler.faults, Handler.asked[:] = {"/shards/0.tar": [fault] * 9}, []
    with pytest.raises(BadImage, match=f"^it cannot be read: .*{reason}"):
        images.open(0)
    assert len(Handler.asked) == tries


def test_a_listing_of_many_requests_may_take_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asyn = pytest.importorskip("fsspec.asyn")

    class Large(asyn.AsyncFileSystem):  # type: ignore[misc, name-defined]
        protocol = "large"

        async def _find(self, path: str, **_: object) -> dict[str, dict[str, str]]:
            await asyncio.sleep(0.3)
            return {f"{path}/{i}.png": {"name": f"{path}/{i}.png", "type": "file"} for i in range(3)}

    monkeypatch.setattr(storage, "_filesystem", lambda address: (Large(), address.partition("://")[2]))
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.05)
    assert storage.listed("large://bucket", "find") == [f"large://bucket/{i}.png" for i in range(3)]


@web
def test_a_server_without_ranges_is_said_to_have_none(server: str) -> None:
    images = find_images([f"{server}/shards/0.tar"])
    Handler.faults = {"/shards/0.tar": ["whole"]}
    with pytest.raises(BadImage, match="the server gives the whole file in place of a part"):
        images.open(0)


@web
def test_of_a_shard_only_the_image_is_read(server: str) -> None:
    images = find_images([f"{server}/shards/0.tar"])
    del Handler.asked[:]
    with images.open(2) as file:
        assert file.read() == image(2)
    ((_, asked),) = Handler.asked
    first, last = map(int, str(asked).removeprefix("bytes=").split("-"))
    assert last - first + 1 == len(image(2)) + 512


@web
def test_an_object_that_changed_is_indexed_anew_and_gives_no_wrong_image(
    folder: Path, server: str, tmp_path: Path
) -> None:
    path, store = folder / "changing.tar", Storage(tmp_path)
    path.write_bytes((folder / "shards/0.tar").read_bytes())
    images = find_images([f"{server}/changing.tar"], storage=store)
    path.write_bytes((folder / "shards/0.tar").read_bytes()[2048:])
    os.utime(path, (1, 1))
    with pytest.raises(BadImage, match="it cannot be read"):
        images.open(0)
    assert len(find_images([f"{server}/changing.tar"], storage=store)) < len(images)
    path.unlink()
    with pytest.raises(BadImage, match="it cannot be read"):
        images.open(0)


@bucket
def test_an_index_lies_beside_shards_in_a_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_images([f"{s3}/shards"], storage=Storage(beside=True))
    monkeypatch.setattr("fcmae.data.shards.scan", None)
    assert_same(find_images([f"{s3}/shards"]), expected)


def test_a_part_that_is_not_there_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert Storage().read(str(tmp_path / "x"), 3, 4) == b"3456"
    for start, size in ((3, 8), (10, 1), (99, 1), (0, 2**62)):
        with pytest.raises(CutShort, match="it is cut off"):
            Storage().read(str(tmp_path / "x"), start, size)


# The cache


@web
@pytest.mark.parametrize(
    ("names", "keeps"),
    [
        ([], True),
        ([".lock", ".tmp-config.yaml"], True),
        ([".lock", "config.yaml", "mine.txt"], True),
        (["mine.txt"], False),
        ([".lock", "mine.txt"], False),
    ],
)
def test_a_run_keeps_indexes_and_a_cache_unless_its_directory_is_somebody_elses(
    tmp_path: Path, names: list[str], keeps: bool
) -> None:
    for name in names:
        (tmp_path / name).touch()
    storage = Storage.of_run(tmp_path, "run", 1.0)
    assert (storage.kept is not None, storage.cache is not None) == (keeps, keeps)


def test_what_is_cached_is_read_once(server: str, tmp_path: Path) -> None:
    store = Storage(cache=Cache(tmp_path / "cache", 10**8))
    images = find_images([f"{server}/shards"], storage=store)
    expected = contents(images)
    del Handler.asked[:]
    assert contents(images) == expected and not Handler.asked
    again = Storage(cache=Cache(tmp_path / "cache", 10**8))
    assert contents(find_images([f"{server}/shards"], storage=again)) == expected
    assert len([asked for _, asked in Handler.asked if asked]) <= 4  # for the index; there are eight images


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.read"))


def test_a_cache_forgets_what_was_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda most: 0)  # it looks each time
    cache = Cache(tmp_path, 64_000)
    for number in range(90):
        cache.put(str(number), bytes(900))
        os.utime(cache._path(str(number)), ns=(number, number))
        if number < 50:
            assert cache.get("0") is not None  # and is noted as used now
        assert taken(tmp_path) <= 64_000
    assert cache.get("89") == bytes(900) and cache.get("0") == bytes(900) and cache.get("1") is None
    cache.put("large", bytes(2_000))
    assert cache.get("large") is None


def test_a_cache_keeps_to_its_size_however_many_processes_fill_it_and_looks_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbelow", Random(0).randrange)
    looks, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (looks.append(self), glob(self, pattern))[1])
    caches = [Cache(tmp_path, 64_000) for _ in range(32)]
    sizes = []
    for number in range(640):  # nine times what it holds
        caches[number % 32].put(str(number), bytes(900))
        sizes.append(taken(tmp_path))
    assert max(sizes) <= 76_000 and sizes[-1] > 50_000
    assert 16 * 9 / 2 < len(looks) < 16 * 9 * 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file", 10**6)
    cache.put("x", b"1")
    assert cache.get("x") is None


# Runs


@bucket
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_bucket_is_the_run_on_the_folder(folder: Path, s3: str, tmp_path: Path, workers: int) -> None:
    options = {"epochs": 2, "data__val_share": 0.1, "data__cache_gb": 0.01, "data__num_workers": workers}
    assert main(["pretrain", *runs.flags(folder / "shards", tmp_path / "here", **options)]) == 0
    assert (
        main(["pretrain", *runs.flags(Path("S3"), tmp_path / "afar", **options | {"data__path": f"{s3}/shards"})]) == 0
    )
    runs.assert_same(runs.final_state(tmp_path / "afar"), runs.final_state(tmp_path / "here"))
    assert runs.losses(tmp_path / "afar") == runs.losses(tmp_path / "here")
    assert len(list((tmp_path / "afar/cache").rglob("*.read"))) == 8
    assert main(["pretrain", *runs.flags(folder / "shards", tmp_path / "afar", epochs=1), "--overwrite", "true"]) == 0
    assert not list((tmp_path / "afar").rglob("*.read"))


def test_what_the_disk_damaged_in_a_cache_is_read_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    for kept in (b"", b"other bytes of an image", None):
        cache.put("x", b"bytes of an image")
        assert cache.get("x") == b"bytes of an image"
        content = cache._path("x").read_bytes()
        cache._path("x").write_bytes(content[:-1] + b"E" if kept is None else kept)
        assert cache.get("x") is None


def test_files_that_another_process_removes_meanwhile_do_not_keep_a_cache_from_being_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda most: 0)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [tmp_path / "gone.read", *glob(self, pattern)])
    cache = Cache(tmp_path, 6400)
    for number in range(200):
        cache.put(str(number), bytes(60))
    assert cache.get("199") == bytes(60) and taken(tmp_path) <= 6400


@web
def test_a_shard_that_changed_is_told_by_its_time_where_the_server_has_no_other_version(
    folder: Path, server: str, tmp_path: Path
) -> None:
    path = folder / "same-size.tar"
    path.write_bytes((folder / "shards/0.tar").read_bytes())
    stamps = []
    for seconds in (10**9, 10**9 + 5):
        os.utime(path, (seconds, seconds))
        stamps.append(Storage().stamp(f"{server}/same-size.tar"))
    path.unlink()
    assert stamps[0][0] == stamps[1][0] and stamps[0] != stamps[1]


@web
def test_classes_on_a_web_server_have_the_names_of_their_folders(folder: Path, server: str) -> None:
    for name in ("café au lait", "tea"):
        (folder / "drinks" / name).mkdir(parents=True)
        (folder / "drinks" / name / "0.png").write_bytes(image(0))
    assert find_labelled(f"{server}/drinks").class_names == ("café au lait", "tea")
    shutil.rmtree(folder / "drinks")
