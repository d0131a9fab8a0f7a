"""What wrong arguments get: the argument's name, and the rule."""

import copy
import datetime
import decimal
import fractions
import math
import pickle
import threading

import nblock
import pytest

LONGEST = 366 * 86400


@pytest.fixture
def client():
    with nblock.Client("memory:") as client:
        yield client


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        (b"x", TypeError, "key must be str, not bytes"),
        (None, TypeError, "key must be str, not NoneType"),
        (1, TypeError, "key must be str, not int"),
        ("", ValueError, "key must have .*got 0 bytes"),
        ("x" * (2**20 + 1), ValueError, "key must have .*got 1048577 bytes"),
        ("é" * (2**19 + 1), ValueError, "1 byte to 1 MiB"),
        ("a\ud800b", ValueError, "lone surrogate"),
    ],
)
def test_keys(client, key, error, says):
    makers = [nblock.Lock, nblock.ReentrantLock, nblock.AsyncLock, nblock.synchronized]
    for make in [*makers, client.lock, client.reentrant_lock, client.find, nblock.find]:
        with pytest.raises(error, match=says):
            make(key)


@pytest.mark.parametrize("key", ["\0", "a\0b", " ", "😀", "x" * 2**20, "\U0010ffff"])
def test_any_other_text_is_a_key(client, key):
    with client.lock(key):
        assert [record.key for record in client.locks()] == [key]
        assert client.find(key).key == key
        assert not client.lock(key).try_lock()
    assert client.find(key) is None


@pytest.mark.parametrize("expire", [0, -1, 0.0009, LONGEST + 1, math.inf, -math.inf, math.nan, 10**400, datetime.timedelta(0)])
def test_wrong_expires(client, expire):
    lock = client.lock("x")
    for call in [
        lambda: client.lock("x", expire=expire),
        lambda: nblock.Lock("x", expire=expire),
        lambda: nblock.ReentrantLock("x", expire=expire),
        lambda: nblock.AsyncLock("x", expire=expire),
        lambda: nblock.synchronized("x", expire=expire),
        lambda: nblock.Client("memory:", expire=expire),
        lambda: nblock.configure("memory:", expire=expire),
        lambda: lock.lock(expire=expire),
        lambda: lock.try_lock(expire=expire),
        lambda: lock.refresh(expire=expire),
        lambda: lock.synchronize(expire=expire),
    ]:
        with pytest.raises(ValueError, match="expire (must be|is too large)"):
            call()
    assert client.find("x") is None


@pytest.mark.parametrize(
    "expire",
    [
        0.001,
        1,
        True + 1.0,
        LONGEST,
        decimal.Decimal("1.5"),
        fractions.Fraction(1, 2),
        datetime.timedelta(milliseconds=1),
        datetime.timedelta(days=366),
    ],
)
def test_right_expires(client, expire):
    client.lock("x", expire=expire)
    client.lock("x").try_lock(expire=expire)


@pytest.mark.parametrize("timeout", [-1, -0.001, -math.inf, math.nan, datetime.timedelta(seconds=-1)])
def test_wrong_timeouts(client, timeout):
    lock = client.lock("x")
    for call in [
        lambda: client.lock("x", timeout=timeout),
        lambda: nblock.Client("memory:", timeout=timeout),
        lambda: lock.lock(timeout=timeout),
        lambda: lock.synchronize(timeout=timeout),
    ]:
        with pytest.raises(ValueError, match="timeout must be"):
            call()
    assert client.find("x") is None


@pytest.mark.parametrize("timeout", [0, 0.0, 1e-9, 1e300, math.inf, threading.TIMEOUT_MAX])
def test_right_timeouts(client, timeout):
    lock = client.lock("x", timeout=timeout)
    lock.lock(timeout=timeout)
    lock.unlock()


def test_a_timedelta_lasts_as_long_as_it_says(client):
    lock = client.lock("x", timeout=datetime.timedelta(hours=1))
    lock.lock(expire=datetime.timedelta(minutes=5))
    assert 240 < lock.remaining <= 300
    lock.refresh(expire=datetime.timedelta(minutes=10))
    assert 540 < lock.remaining <= 600
    assert not client.lock("x").acquire(timeout=datetime.timedelta(milliseconds=1))
    lock.unlock()
    client.close(datetime.timedelta(seconds=5))


@pytest.mark.parametrize("limit", [0, 0.0009, 3600.1, -1, math.nan, datetime.timedelta(hours=2)])
def test_wrong_limits_of_requests(limit):
    for name in ("op_timeout", "connect_timeout"):
        for make in (nblock.Client, nblock.configure):
            with pytest.raises(ValueError, match=f"{name} must be between 0.001 s and 3600 s"):
                make("memory:", **{name: limit})


def test_right_limits_of_requests():
    for limit in (0.001, 3600, datetime.timedelta(seconds=1)):
        with nblock.Client("memory:", op_timeout=limit, connect_timeout=limit) as client:
            client.ping()


def test_the_shorter_limit_of_connecting_ends_first(run):
    program = run(
        """
        import queue, socket, threading, nblock
        # It lets nobody in, and says nothing.
        silent = socket.create_server(("127.0.0.1", 0))
        url = f"rethinkdb://127.0.0.1:{silent.getsockname()[1]}/db"

        def connect(limit):
            try:
                nblock.Client(url, connect_timeout=limit)
            except nblock.StoreError as error:
                print(limit, error.status)

        for limit in (20, 0.1):
            threading.Thread(target=connect, args=(limit,), daemon=True).start()
        input()
        """
    )
    # The other one still waits.
    program.expect("0.1 NBL_ERR_UNREACHABLE")
    program.tell()


def test_what_cannot_be_pickled_says_what_to_do_instead(client):
    for thing, says in [
        (nblock.Lock("x"), "a Lock cannot be pickled or copied: pass its key"),
        (nblock.ReentrantLock("x"), "a ReentrantLock cannot be pickled or copied: pass its key"),
        (nblock.AsyncLock("x"), "an AsyncLock cannot be pickled or copied: pass its key"),
        (client, "a Client cannot be pickled or copied: pass its URL"),
    ]:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=says):
                attempt(thing)


@pytest.mark.parametrize("wrong", ["1", b"1", [], True])
def test_wrong_types_of_numbers(client, wrong):
    lock = client.lock("x")
    for name in ("expire", "timeout"):
        for call in (lock.lock, lock.synchronize, lambda **named: client.lock("x", **named)):
            with pytest.raises(TypeError, match=f"{name} must be a number of seconds"):
                call(**{name: wrong})


def test_other_wrong_types(client):
    for call, says in [
        (lambda: client.lock("x", auto_refresh=1), "auto_refresh must be True, False or None"),
        (lambda: client.lock("x", fence="yes"), "fence must be True, False or None"),
        (lambda: client.lock("x", on_lost=1), "on_lost must be a callable or None, not int"),
        (lambda: nblock.AsyncLock("x", on_lost=1), "on_lost must be a callable or None, not int"),
        (lambda: nblock.Lock("x", client="memory:"), "client must be an nblock.Client or None, not str"),
        (lambda: nblock.Client(1), "url must be str, not int"),
        (lambda: nblock.Client("memory:", app=1), "app must be str, not int"),
        (lambda: nblock.ReentrantLock("x", 1), "owner_token must be str, not int"),
        (lambda: client.lock("x", 1), "positional"),
        (lambda: client.lock("x").try_lock(1), "positional"),
        (lambda: client.lock("x", patience=1), "patience"),
    ]:
        with pytest.raises(TypeError, match=says):
            call()


def test_other_wrong_values(client):
    for call, says in [
        (lambda: nblock.Client("nowhere:"), "nowhere"),
        (lambda: nblock.Client("memory:\0"), "url must not contain a NUL"),
        (lambda: nblock.Client("memory:\udfff"), "url .* lone surrogate"),
        (lambda: nblock.Client("memory:", app="x" * 256), r"app must have at most 255 bytes \(got 256\)"),
        (lambda: nblock.ReentrantLock("x", ""), "owner_token must have .*got 0 bytes"),
        (lambda: nblock.ReentrantLock("x", "y" * 256), "owner_token must have .*got 256 bytes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_passwords_are_not_shown():
    with pytest.raises((ValueError, nblock.Error)) as caught:
        nblock.Client("rethinkdb://user:geheim@127.0.0.1:1/db")
    assert "geheim" not in str(caught.value)
