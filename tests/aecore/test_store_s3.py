"""The store in a bucket, against a real S3 server, and through a proxy that spoils what passes."""

import asyncio
import contextlib
import gc
import hashlib
import os
import pickle
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aecore.artifact.commit import commit_manifest
from aecore.artifact.documents import read_json, sealed
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import AlreadyExists, FileRef, absolute_url, open_files, open_store
from aecore.store import _s3 as s3_module
from aecore.store import _s3_client as client_module
from aecore.store import _s3_prefix as place_module
from aecore.store import _scratch as scratch_module
from aecore.store._environment import FAULT_STAGES
from aecore.store._s3 import S3Store
from tests.processes import WARM, run
from tests.s3 import ACCESS_KEY, SECRET_KEY, s3_environment
from tests.s3.proxy import FaultProxy


def ref_of(name: str, data: bytes) -> FileRef:
    return FileRef(name, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_module, "PART_BYTES", 1 << 20)


class TestAddresses:
    def test_an_s3_url_stays_itself(self):
        assert absolute_url("s3://bucket/a/b/") == "s3://bucket/a/b"
        assert absolute_url("s3://work@bucket/a") == "s3://work@bucket/a"

    @pytest.mark.parametrize("secret", ["verysecret", "verysecret/with+slash", "verysecret//", "/verysecret"])
    def test_keys_in_a_url_are_refused_and_not_repeated(self, secret):
        with pytest.raises(ConfigError, match="never into a URL") as raised:
            absolute_url(f"s3://AKIA:{secret}@bucket/a")
        assert "verysecret" not in str(raised.value)

    @pytest.mark.parametrize("url", ["s3:///a", "s3://bucket/a/../b", "s3://bucket//a", "gs://bucket/a"])
    def test_others_are_refused(self, url):
        with pytest.raises(ConfigError):
            absolute_url(url)


class TestFiles:
    def test_what_is_put_is_read_listed_and_sized(self, s3):
        store = open_store(f"{s3.url}/table")
        ref = store.put("records/a.json", b"{}", role="record")
        assert ref == ref_of("records/a.json", b"{}")
        assert store.read("records/a.json", ref=ref) == b"{}"
        assert store.size("records/a.json") == 2
        assert store.size("records/b.json") is None
        store.put("top.json", b"1", role="record")
        assert store.list() == ["records", "top.json"]
        assert store.list("records") == ["a.json"]
        assert store.list("nothing") == []
        head = s3.raw.head_object(Bucket=s3.bucket, Key="table/records/a.json")
        assert {name.lower(): value for name, value in head["Metadata"].items()} == {"sha256": ref.sha256}
        store.remove("top.json")
        store.remove("top.json")
        assert store.list() == ["records"]

    def test_many_names_are_listed_page_by_page(self, s3, monkeypatch):
        monkeypatch.setattr(place_module, "PAGE", 10)
        store = open_store(s3.url)
        names = [f"n{number:04d}" for number in range(35)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: store.put(name, b"x", role="record"), names))
        assert store.list() == names
        assert list(open_files(s3.url).sizes()) == names

    def test_the_same_again_is_success_other_bytes_are_refused(self, s3):
        store = open_store(f"{s3.url}/x")
        store.put("a", b"one", role="part")
        store.put("a", b"one", role="part")
        with pytest.raises(AlreadyExists, match="nothing was overwritten"):
            store.put("a", b"two", role="part")
        assert store.read("a") == b"one"

    def test_a_name_taken_by_somebody_without_metadata_is_compared_by_content(self, s3):
        s3.raw.put_object(Bucket=s3.bucket, Key="x/a", Body=b"one")
        store = open_store(f"{s3.url}/x")
        store.put("a", b"one", role="part")
        with pytest.raises(AlreadyExists):
            store.put("a", b"two", role="part")

    def test_of_writers_at_once_one_wins_and_late_ones_are_refused(self, s3):
        store = open_store(s3.url)

        def write(number):
            try:
                return store.put("a", b"%d" % number * 1000, role="part")
            except AlreadyExists:
                return None

        with ThreadPoolExecutor(8) as pool:
            (winner,) = [ref for ref in pool.map(write, range(8)) if ref]
        kept = store.read("a")
        assert ref_of("a", kept) == winner
        assert all(write(number) is None for number in range(8) if kept != b"%d" % number * 1000)
        assert store.read("a") == kept

    def test_a_large_file_goes_in_parts_and_comes_back(self, s3, small_parts):
        data = os.urandom((5 << 20) + 17)
        store = open_store(f"{s3.url}/big")
        for _ in range(2):  # the second is refused by the service and found equal
            with store.stage() as staged:
                staged.write_bytes(data)
                ref = store.put_staged("shards/a.tar", staged, role="tar")
            assert not staged.exists()
        assert ref == ref_of("shards/a.tar", data)
        assert store.local(ref).read_bytes() == data
        store.check(ref, verify=True)
        with store.stage() as staged, pytest.raises(AlreadyExists):
            staged.write_bytes(data[::-1])
            store.put_staged("shards/a.tar", staged, role="tar")
        assert not s3.raw.list_multipart_uploads(Bucket=s3.bucket).get("Uploads")

    def test_damage_and_loss_are_found(self, s3):
        store = open_store(s3.url)
        ref = store.put("a", b"content", role="part")
        s3.raw.put_object(Bucket=s3.bucket, Key="a", Body=b"CONTENT")
        for read in (lambda: store.read("a", ref=ref), lambda: store.check(ref, verify=True), lambda: store.local(ref)):
            with pytest.raises(DataError, match="damaged"):
                read()
        store.check(ref)
        s3.raw.put_object(Bucket=s3.bucket, Key="a", Body=b"short")
        for read in (lambda: store.check(ref), lambda: store.local(ref), lambda: store.read("a", ref=ref)):
            with pytest.raises(DataError, match=r"5 bytes, the manifest says 7"):
                read()
        s3.raw.delete_object(Bucket=s3.bucket, Key="a")
        for read in (lambda: store.check(ref), lambda: store.local(ref), lambda: store.read("a")):
            with pytest.raises(DataError, match="missing"):
                read()

    def test_an_object_of_more_bytes_than_the_limit_is_not_received(self, s3):
        store = open_store(s3.url)
        ref = store.put("a", bytes(64 << 20), role="part")
        received = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for known in (None, ref):
            with pytest.raises(DataError, match="a has 67108864 bytes, expected at most 1000 in a file of this kind"):
                store.read("a", ref=known, limit=1000)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - received < 32 << 10, "kilobytes"
        small = store.put("b", b"12345", role="part")
        for limit in (5, 4):  # the second time it comes from memory
            for known in (None, small):
                if limit == 5:
                    assert store.read("b", ref=known, limit=limit) == b"12345"
                else:
                    with pytest.raises(DataError, match="b has 5 bytes, expected at most 4"):
                        store.read("b", ref=known, limit=limit)

    @pytest.mark.parametrize("use", ["read", "documents", "check", "local", "files"])
    def test_a_read_after_a_mismatch_asks_past_proxies(self, bad_s3, s3_proxy, use):
        url = f"{bad_s3.url}/in"
        store, data = open_store(url), sealed({"kind": "run", "claim": 1, "identity": {}, "info": {}})
        ref = store.put("run.000001.json", data, role="part")
        if use == "documents":
            s3_proxy.headers = {"ETag": '"0-2"', "x-amz-meta-sha256": None}  # nothing but its own hash shows the damage
        s3_proxy.add("^GET", "flip", bit=8 * 80)
        read = {
            "read": lambda: store.read(ref.name),
            "documents": lambda: read_json(store, ref.name),
            "check": lambda: store.check(ref, verify=True),
            "local": lambda: store.local(ref),
            "files": lambda: open_files(url).read(ref.name),
        }[use]
        read()
        first, second = (head for head in s3_proxy.heads if head.startswith("GET"))
        assert "\r\ncache-control:" not in first.lower()
        assert "\r\nCache-Control: no-cache\r\n" in second
        s3_proxy.clear()
        store.read(ref.name, fresh=True)
        assert store.read(ref.name, fresh=True) == data
        store.remove(ref.name)
        assert ["Cache-Control: no-cache" in head for head in s3_proxy.heads] == [True, True, False]

    def test_a_damaged_copy_on_this_machine_is_fetched_again(self, s3):
        store, data = open_store(s3.url), os.urandom(5000)
        ref = store.put("model.safetensors", data, role="checkpoint")
        assert store.read(ref.name, ref=ref) == data
        store.local(ref).write_bytes(data[:4000] + bytes(1000))  # of the right size, as a power failure leaves it
        assert store.read(ref.name, ref=ref) == data

    def test_a_store_travels_without_credentials(self, s3):
        store = open_store(f"{s3.url}/x")
        store.put("a", b"1", role="part")  # its session is open
        travelled = pickle.dumps(store)
        assert SECRET_KEY.encode() not in travelled and ACCESS_KEY.encode() not in travelled
        assert pickle.loads(travelled).read("a") == b"1"

    def test_files_of_a_source_are_listed_and_read_ahead(self, s3):
        for number in range(60):
            s3.raw.put_object(Bucket=s3.bucket, Key=f"in/c/{number:03d}.png", Body=b"%d" % number)
        s3.raw.put_object(Bucket=s3.bucket, Key="in/.hidden/x.png", Body=b"x")
        files = open_files(f"{s3.url}/in")
        sizes = files.sizes()
        assert list(sizes) == [f"c/{number:03d}.png" for number in range(60)]
        read = files.prefetch(list(sizes))
        assert [read(name) for name in sizes] == [b"%d" % number for number in range(60)]
        s3.raw.delete_object(Bucket=s3.bucket, Key="in/c/007.png")
        read, found = files.prefetch(list(sizes)), []
        for name in sizes:
            try:
                found.append(read(name))
            except FileNotFoundError:
                found.append(None)
        assert found[7] is None and found[8] == b"8" and len(found) == 60
        assert files.local("c/001.png").read_bytes() == b"1"
        with pytest.raises(DataError, match="no object"):
            open_files(f"{s3.url}/nothing").sizes()


class TestCommit:
    """What a manifest is about to name is looked at by listing its folders."""

    def files(self, s3, names):
        """Put one file under each name, past the store."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: s3.raw.put_object(Bucket=s3.bucket, Key=f"ds/{name}", Body=name.encode()), names))
        return [ref_of(name, name.encode()) for name in names]

    def commit(self, s3, s3_proxy, new, old=(), parent=0):
        """Return how many HEADs and LISTs a commit sends."""
        s3_proxy.clear()
        commit_manifest(open_store(f"{s3.url}/ds"), "dataset", parent, {"number_of_files": len(new)}, new=new, old=old)
        assert s3_proxy.seen("^PUT .*dataset") == 1
        return s3_proxy.seen("^HEAD"), s3_proxy.seen("list-type=2")

    def test_a_listing_of_each_folder_replaces_a_request_for_each_file(self, bad_s3, s3_proxy, monkeypatch):
        monkeypatch.setattr(place_module, "PAGE", 50)
        names = [f"shards/train-{number:06d}.{kind}" for number in range(60) for kind in ("tar", "parquet")]
        first = self.files(bad_s3, [*names, "listings/000001.parquet", "quarantine/train-000007.parquet"])
        assert self.commit(bad_s3, s3_proxy, first) == (2, 3), "three pages of shards; the two folders of one file are not worth a listing"
        more = self.files(bad_s3, [name.replace("train-", "train-g000002-") for name in names[:20]])
        assert self.commit(bad_s3, s3_proxy, more, first, parent=1) == (0, 1 + 3 + 1 + 1), "of an append its own page, and what was there"

    def test_a_few_files_far_from_each_other_are_asked_for_one_by_one(self, bad_s3, s3_proxy, monkeypatch):
        monkeypatch.setattr(place_module, "PAGE", 10)
        refs = self.files(bad_s3, [f"shards/{number:03d}" for number in range(100)])
        assert self.commit(bad_s3, s3_proxy, refs[::5]) == (16, 2), "not all ten pages for 20 files"
        assert self.commit(bad_s3, s3_proxy, refs[::50], parent=1) == (2, 0)

    def test_what_a_listing_does_not_show_is_asked_for_before_it_is_refused(self, bad_s3, s3_proxy, monkeypatch):
        monkeypatch.setattr(place_module, "PAGE", 10)
        refs = self.files(bad_s3, [f"shards/{number:03d}" for number in range(40)])
        pages = S3Store._pages

        def late(store, **arguments):  # as of a service whose listings lag behind
            for page in pages(store, **arguments):
                yield {**page, "Contents": [entry for entry in page.get("Contents", ()) if not entry["Key"].endswith("7")]}

        monkeypatch.setattr(S3Store, "_pages", late)
        assert self.commit(bad_s3, s3_proxy, refs) == (4, 4)
        assert self.commit(bad_s3, s3_proxy, [], refs, parent=1) == (4, 4), "of the parent too"
        bad_s3.raw.delete_object(Bucket=bad_s3.bucket, Key="ds/shards/017")
        for new, old, says in ((refs, (), r"shards/017 is missing"), ([], refs, r"shards/017 is gone \(4 of 40 files are not listed\)")):
            with pytest.raises(DataError, match=says):
                self.commit(bad_s3, s3_proxy, new, old, parent=2)
        bad_s3.raw.put_object(Bucket=bad_s3.bucket, Key="ds/shards/017", Body=b"longer than it was")
        with pytest.raises(DataError, match=r"shards/017 has 18 bytes, the manifest says 10"):
            self.commit(bad_s3, s3_proxy, refs, parent=2)
        assert not [name for name in bad_s3.objects() if name.endswith("000003.json")]


KILLED = """
import sys
from aecore.store import open_store
store = open_store(sys.argv[1])
with store.stage() as staged:
    staged.write_bytes(b"x" * 100)
    store.put_staged("a", staged, role="part")
"""


def test_what_another_container_stages_in_a_shared_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_module.tempfile, "gettempdir", lambda: str(tmp_path))
    store = open_store("s3://bucket/a")
    with monkeypatch.context() as there:
        there.setattr(scratch_module.os, "getpid", lambda: 4_194_305)  # not a process here
        there.setattr("socket.gethostname", lambda: "elsewhere")
        with store.stage() as theirs:
            theirs.write_bytes(b"being uploaded")
            there.undo()
            monkeypatch.setattr(scratch_module.tempfile, "gettempdir", lambda: str(tmp_path))
            monkeypatch.setattr(scratch_module, "_cleaned", set())
            with store.stage():
                assert theirs.exists()


@pytest.mark.parametrize("stage", FAULT_STAGES)
def test_a_killed_writer_leaves_nothing_or_everything(s3, tmp_path, stage):
    environment = os.environ | {"AECORE_FAULT": f"part.{stage}", "TMPDIR": str(tmp_path)}
    command = [*WARM, "-c", KILLED, s3.url]
    assert run(command, env=environment).returncode == -9
    assert s3.objects() == ({"a": b"x" * 100} if stage == "linked" else {})
    assert len(list(tmp_path.glob("aecore-staged-*/*"))) == 1
    run(command, env={**environment, "AECORE_FAULT": ""}, check=True)
    assert s3.objects() == {"a": b"x" * 100}
    assert not list(tmp_path.glob("aecore-staged-*/*")), "what the killed process left on this machine is removed"


class TestFaults:
    """Each fault is survived, or refused in bounded time with the object whole or absent."""

    def test_passing_503s_and_resets_are_survived(self, bad_s3, s3_proxy):
        store = open_store(bad_s3.url)
        s3_proxy.add("PUT", "status", code="SlowDown", times=2)
        s3_proxy.add("GET", "reset", times=2)
        ref = store.put("a", b"content", role="part")
        assert store.read("a", ref=ref) == b"content"
        assert s3_proxy.seen("PUT") == 3 and s3_proxy.seen("GET") == 3

    @pytest.mark.parametrize("how", ["close", "abort"])
    def test_a_cut_body_is_read_again(self, bad_s3, s3_proxy, how):
        store, data = open_store(bad_s3.url), os.urandom(300_000)
        ref = store.put("a", data, role="part")
        s3_proxy.add("GET", "cut", after=100_000, seconds=float(how == "abort"), times=2)
        assert store.read("a") == data
        s3_proxy.add("GET", "cut", after=100_000, seconds=float(how == "abort"), times=2)
        assert store.local(ref).read_bytes() == data
        assert s3_proxy.seen("GET") == 6

    def test_a_lost_acknowledgement_of_a_create_is_our_success(self, bad_s3, s3_proxy):
        store = open_store(bad_s3.url)
        s3_proxy.add("PUT", "lost_ack")
        assert store.put("a", b"content", role="part") == ref_of("a", b"content")
        assert bad_s3.objects() == {"a": b"content"}
        assert s3_proxy.seen("HEAD") == 1, "the name was taken, by us"

    def test_a_failed_part_is_sent_again(self, bad_s3, s3_proxy, small_parts):
        store, data = open_store(bad_s3.url), os.urandom(5 << 20)
        s3_proxy.add(r"PUT .*partNumber=2", "status", code="InternalError", status=500, times=2)
        s3_proxy.add(r"PUT .*partNumber=3", "reset")
        s3_proxy.add(r"POST .*uploadId", "lost_ack")
        with store.stage() as staged:
            staged.write_bytes(data)
            ref = store.put_staged("a", staged, role="tar")
        assert bad_s3.objects() == {"a": data}
        store.check(ref, verify=True)

    def test_a_part_that_fails_for_good_leaves_nothing(self, bad_s3, s3_proxy, small_parts):
        store = open_store(bad_s3.url)
        s3_proxy.add(r"PUT .*partNumber=2", "status", code="InternalError", status=500, times=None)
        with store.stage() as staged, pytest.raises(StoreError, match=r"cannot write part 2 of .*InternalError"):
            staged.write_bytes(os.urandom(5 << 20))
            store.put_staged("a", staged, role="tar")
        assert bad_s3.objects() == {}
        assert not bad_s3.raw.list_multipart_uploads(Bucket=bad_s3.bucket).get("Uploads"), "the upload was aborted"

    def test_a_permanent_503_is_given_up_in_bounded_time(self, bad_s3, s3_proxy, monkeypatch):
        monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.01)
        s3_proxy.add(".", "status", code="ServiceUnavailable", times=None)
        with pytest.raises(StoreError, match=r"tried 6 times in \d+ s\): the service answered ServiceUnavailable"):
            open_store(bad_s3.url).put("a", b"1", role="part")
        assert len(s3_proxy.log) == client_module.ATTEMPTS, "nobody else tries again"

    def test_a_delay_is_waited_for_and_silence_is_not(self, bad_s3, s3_proxy, monkeypatch):
        store = open_store(bad_s3.url)
        s3_proxy.add("PUT", "delay", seconds=1.0)
        store.put("a", b"1", role="part")
        monkeypatch.setattr(client_module, "READ_TIMEOUT_S", 1)
        monkeypatch.setattr(client_module, "ATTEMPTS", 2)
        client_module.close_clients()
        s3_proxy.add("GET", "delay", seconds=30.0, times=None)
        with pytest.raises(StoreError, match=r"tried 2 times .*nothing answers at http://127.0.0.1"):
            open_store(bad_s3.url).read("a")
        assert s3_proxy.seen("GET") == 2, "nobody else tries again"

    @pytest.mark.parametrize(
        ("code", "status", "says"),
        [
            ("ExpiredToken", 400, "get new credentials"),
            ("AccessDenied", 403, "may not do this"),
            ("SignatureDoesNotMatch", 403, "secret key is wrong"),
            ("InvalidAccessKeyId", 403, "does not know the access key"),
            ("NotImplemented", 501, "conditional creates"),
        ],
    )
    def test_what_a_user_must_mend_fails_at_once(self, bad_s3, s3_proxy, code, status, says):
        s3_proxy.add("PUT", "status", code=code, status=status, times=None)
        with pytest.raises(StoreError, match=says):
            open_store(bad_s3.url).put("a", b"1", role="part")
        assert s3_proxy.seen("PUT") == 1

    def test_a_connection_that_does_not_come_in_time_is_tried_again(self, s3, monkeypatch):
        from botocore.exceptions import ConnectTimeoutError
        from s3fs import S3FileSystem

        store, call, left = open_store(s3.url), S3FileSystem._call_s3, [ConnectTimeoutError(endpoint_url="x")] * 2

        async def late(self, method, *args, **kwargs):
            if left:
                raise left.pop()
            return await call(self, method, *args, **kwargs)

        monkeypatch.setattr(S3FileSystem, "_call_s3", late)
        store.put("a", b"1", role="part")
        assert s3.objects() == {"a": b"1"} and not left

    def test_a_conflict_of_two_creates_is_tried_again(self, bad_s3, s3_proxy):
        s3_proxy.add("PUT", "status", code="ConditionalRequestConflict", status=409)
        open_store(bad_s3.url).put("a", b"1", role="part")
        assert bad_s3.objects() == {"a": b"1"}


def test_all_sessions_share_what_botocore_reads_of_the_services():
    clients = [client_module.Client(None), client_module.Client(None, unsigned=True)]
    first, second = (client._session().filesystem.session.get_component("data_loader") for client in clients)
    assert first is second
    for client in clients:
        client.close()


SENT = 32 << 20  # bytes: more than the buffers of both ends hold


def began_to_send(silent: socket.socket) -> socket.socket:
    """Take a connection, say to go on to who asks, and return it when bytes of a body have come; they are never read."""
    peer, _ = silent.accept()
    peer.settimeout(60)
    head = b""
    while b"\r\n\r\n" not in head:
        head += peer.recv(1)
    peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert peer.recv(1, socket.MSG_PEEK)
    return peer


def ends(peer: socket.socket) -> bool:
    """Return whether the other side of a connection is closed, after what it has sent."""
    peer.settimeout(20)
    try:
        while peer.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """A service that takes connections and reads no body; the environment has its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        for name, value in s3_environment(listening.getsockname()[1], tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield listening


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_client_that_is_closed_ends_its_connections_whatever_they_still_have_to_send(silent, cancelled):
    client = client_module.Client(None)
    future = client.submit(lambda filesystem: filesystem._call_s3("put_object", Bucket="b", Key="k", Body=bytes(SENT)))
    loop = client._sessions[0][0]
    with began_to_send(silent) as peer:
        if cancelled:
            future.cancel()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(60)  # aiohttp has let go of the connection
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < client_module.REST_S
        assert ends(peer)
        assert future.cancelled()
    assert loop.is_closed()
    gc.collect()  # a socket that nobody has closed is a warning, and so an error


def test_a_proxy_that_ends_leaves_no_connection_of_what_it_still_has_to_send(silent):
    with FaultProxy(silent.getsockname()[1]) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as asking:
        asking.sendall(f"PUT /b/k HTTP/1.1\r\ncontent-length: {SENT}\r\n\r\n".encode())
        asking.settimeout(1)
        with contextlib.suppress(TimeoutError):
            asking.sendall(bytes(SENT))
        peer = began_to_send(silent)
    with peer:
        assert ends(peer)
    gc.collect()


class TestMistakes:
    def test_a_wrong_secret(self, s3, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
        with pytest.raises(StoreError, match="secret key is wrong") as raised:
            open_store(s3.url).list()
        assert "wrong-and-secret" not in str(raised.value)

    def test_no_credentials(self, s3, monkeypatch):
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(StoreError, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
            open_store(s3.url).list()

    def test_a_missing_bucket(self, s3):
        with pytest.raises(StoreError, match=r"cannot list s3://no-such-bucket/x: there is no such bucket at http://127.0.0.1"):
            open_store("s3://no-such-bucket/x").list()

    def test_a_wrong_endpoint(self, s3, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match=r"tried 6 times in \d+ s\): nothing answers at http://127.0.0.1:9: check AWS_ENDPOINT_URL"):
            open_store(s3.url).list()

    @pytest.mark.parametrize(
        ("userinfo", "named_by"),
        [
            ("user:hidden", "AWS_ENDPOINT_URL"),
            (":hidden", "AWS_ENDPOINT_URL"),
            ("hidden:", "AWS_ENDPOINT_URL_S3"),
            ("user:hid%40den", "AWS_ENDPOINT_URL_S3"),
            ("hidden", "profile"),
        ],
    )
    def test_an_endpoint_with_a_password_is_refused_at_once(self, bad_s3, s3_proxy, tmp_path, monkeypatch, userinfo, named_by):
        endpoint, url = f"http://{userinfo}@127.0.0.1:{bad_s3.port}", bad_s3.url
        if named_by == "profile":
            monkeypatch.delenv("AWS_ENDPOINT_URL")
            keys = "aws_access_key_id = a\naws_secret_access_key = b\n"
            (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {endpoint}\n{keys}")
            monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
            url = url.replace("s3://", "s3://lab@")
        else:
            monkeypatch.setenv(named_by, endpoint)
        store, says = open_store(url), rf"the endpoint http://\*\*\*@127.0.0.1:{bad_s3.port} has a user name or a password"
        for use in (store.list, lambda: store.size("a"), lambda: store.read("a"), lambda: open_files(f"{url}/x").read("a")):
            with pytest.raises(ConfigError, match=says) as raised:
                use()
            assert not any(secret in str(raised.value) for secret in ("hidden", "hid%40den"))
        assert s3_proxy.log == [], "no request was sent"

    def test_an_unknown_profile(self, s3):
        with pytest.raises(StoreError, match=r"there is no such profile"):
            open_store(f"s3://nobody@{s3.bucket}/x").list()

    def test_a_profile_gives_endpoint_and_keys(self, s3, tmp_path, monkeypatch):
        config = tmp_path / "config"
        config.write_text(
            f"[profile lab]\nendpoint_url = http://127.0.0.1:{s3.port}\naws_access_key_id = {ACCESS_KEY}\n"
            f"aws_secret_access_key = {SECRET_KEY}\nregion = us-east-1\n"
        )
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        open_store(f"s3://lab@{s3.bucket}/x").put("a", b"1", role="part")
        assert s3.objects() == {"x/a": b"1"}
