# SPDX-License-Identifier: Apache-2.0
"""The orchestrator by itself: every errno of kernel/liveupdate/luo_*.c, with handlers that do nothing."""

import errno

import pytest

from iokeep.soft.kernel.luo import FileHandler, IncomingFile, IncomingSession, Luo
from iokeep.soft.kernel.syserror import SysError


class Thing:
    """A file that counts its references."""

    def __init__(self, kind="thing"):
        self.kind = kind
        self.references = 1

    def get(self):
        self.references += 1
        return self

    def put(self):
        self.references -= 1


class Handler(FileHandler):
    flb = ("flb",)

    def __init__(self, compatible="thing-v1", kind="thing"):
        self.compatible = compatible
        self.kind = kind
        self.calls = []
        self.fail = {}
        self.ready = True

    def _do(self, what):
        self.calls.append(what)
        if what[0] in self.fail:
            raise SysError(self.fail[what[0]], f"{what[0]} fails")

    def can_preserve(self, file):
        return file.kind == self.kind

    def preserve(self, session, file, token):
        self._do(("preserve", token))
        return token

    def unpreserve(self, file, private):
        self._do(("unpreserve", private))

    def freeze(self, file, private):
        self._do(("freeze", private))
        return private + 0x1000

    def unfreeze(self, file, private):
        self._do(("unfreeze", private))

    def retrieve(self, session, entry):
        self._do(("retrieve", entry.token))
        return Thing(self.kind)

    def can_finish(self, session, entry):
        return self.ready

    def finish(self, session, entry):
        self._do(("finish", entry.token))


def luo_of(*handlers, incoming=None, error=""):
    log = []
    luo = Luo(log.append, list(handlers), incoming, error)
    return luo, log


def fails(number, call, *args):
    with pytest.raises(SysError) as caught:
        call(*args)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


INCOMING = [
    IncomingSession("vm-1", (IncomingFile(1, "thing-v1", 0x1000), IncomingFile(2, "thing-v1", 0x2000))),
    IncomingSession("empty", ()),
]


def test_the_device_is_a_singleton():
    luo, _ = luo_of()
    luo.open_device()
    fails(errno.EBUSY, luo.open_device)
    luo.release_device()
    luo.open_device()


@pytest.mark.parametrize(
    "raw", [b"\0" * 64, b"a" * 64, b"\0abc" + b"\0" * 60], ids=["empty", "unterminated", "empty-then-text"]
)
def test_bad_names(raw):
    fails(errno.EINVAL, Luo.name_of, raw)


def test_the_longest_name():
    assert Luo.name_of(b"a" * 63 + b"\0") == "a" * 63


def test_create_and_preserve_errnos():
    handler = Handler()
    luo, _ = luo_of(handler)
    session = luo.create("vm-1")
    fails(errno.EEXIST, luo.create, "vm-1")
    file = Thing()
    luo.preserve(session, 1, file)
    assert file.references == 2
    fails(errno.EEXIST, luo.preserve, session, 1, Thing())
    fails(errno.EBADF, luo.preserve, session, 2, None)
    fails(errno.EEXIST, luo.preserve, session, 1, None)  # the token is looked at before the fd
    fails(errno.ENOENT, luo.preserve, session, 2, Thing("pipe"))
    fails(errno.EBUSY, luo.preserve, session, 2, file)
    fails(errno.EBUSY, luo.preserve, luo.create("vm-2"), 1, file)
    handler.fail["preserve"] = errno.EOPNOTSUPP
    other = Thing()
    fails(errno.EOPNOTSUPP, luo.preserve, session, 2, other)
    assert other.references == 1
    del handler.fail["preserve"]
    luo.preserve(session, 2, other)
    fails(errno.EINVAL, luo.retrieve, session, 1)
    fails(errno.EINVAL, luo.finish, session)
    luo.release_session(session)
    assert [c for c in handler.calls if c[0] == "unpreserve"] == [("unpreserve", 2), ("unpreserve", 1)]
    assert (file.references, other.references) == (1, 1)
    assert luo.flb_count["flb"] == 0
    luo.preserve(luo.create("vm-1"), 1, file)


def test_the_first_handler_that_can_is_taken():
    first, second = Handler("a-v1"), Handler("b-v1")
    luo, _ = luo_of(first, second)
    session = luo.create("s")
    luo.preserve(session, 7, Thing())
    assert first.calls == [("preserve", 7)]
    assert second.calls == []
    assert session.token_of(first, session.files[0].file) == 7
    assert session.token_of(second, session.files[0].file) is None


def test_freeze_keeps_the_order_and_locks():
    handler = Handler()
    luo, _ = luo_of(handler)
    session = luo.create("s")
    luo.create("t")
    for token in (5, 3):
        luo.preserve(session, token, Thing())
    out = luo.freeze()
    assert [(s.name, [(f.token, f.data) for f in s.files]) for s in out] == [
        ("s", [(5, 0x1005), (3, 0x1003)]),
        ("t", []),
    ]
    fails(errno.EBUSY, luo.create, "u")
    fails(errno.EBUSY, luo.preserve, session, 9, Thing())
    luo.unfreeze()
    luo.create("u")
    assert handler.calls[-2:] == [("unfreeze", 5), ("unfreeze", 3)]


def test_a_failed_freeze_thaws_what_was_frozen():
    good, bad = Handler("a-v1", "a"), Handler("b-v1", "b")
    bad.fail["freeze"] = errno.EINVAL
    luo, _ = luo_of(good, bad)
    session = luo.create("s")
    luo.preserve(session, 1, Thing("a"))
    luo.preserve(session, 2, Thing("b"))
    luo.preserve(session, 3, Thing("a"))
    fails(errno.EINVAL, luo.freeze)
    assert [c for c in good.calls if c[0] in ("freeze", "unfreeze")] == [("freeze", 1), ("unfreeze", 1)]
    luo.create("another")


def test_retrieve_and_finish():
    handler = Handler()
    luo, _ = luo_of(handler, incoming=INCOMING)
    finished = []
    luo.flb_finished = finished.append
    luo.open_device()
    fails(errno.ENOENT, luo.retrieve_session, "vm-2")
    session = luo.retrieve_session("vm-1")
    fails(errno.EINVAL, luo.retrieve_session, "vm-1")
    fails(errno.ENOENT, luo.retrieve, session, 3)
    fails(errno.EINVAL, luo.preserve, session, 3, Thing())
    file = luo.retrieve(session, 2)
    assert luo.retrieve(session, 2) is file
    assert file.references == 3
    fails(errno.EBUSY, luo.preserve, luo.create("next"), 1, file)  # still the session's
    handler.ready = False
    fails(errno.EBUSY, luo.finish, session)
    assert not [c for c in handler.calls if c[0] == "finish"]
    handler.ready = True
    luo.finish(session)
    assert [c for c in handler.calls if c[0] == "finish"] == [("finish", 2), ("finish", 1)]
    assert file.references == 2
    assert finished == ["flb"]
    luo.finish(session)  # twice is fine
    luo.release_session(session)
    fails(errno.ENOENT, luo.retrieve_session, "vm-1")
    luo.preserve(luo.create("after"), 1, file)


def test_a_failed_retrieve_is_sticky():
    handler = Handler()
    handler.fail["retrieve"] = errno.EUCLEAN
    luo, _ = luo_of(handler, incoming=INCOMING)
    luo.open_device()
    session = luo.retrieve_session("vm-1")
    fails(errno.EUCLEAN, luo.retrieve, session, 1)
    handler.fail.clear()
    fails(errno.EUCLEAN, luo.retrieve, session, 1)
    assert handler.calls == [("retrieve", 1)]


def test_closing_an_incoming_session_finishes_it():
    handler = Handler()
    luo, _ = luo_of(handler, incoming=INCOMING)
    luo.open_device()
    luo.release_session(luo.retrieve_session("vm-1"))
    assert handler.calls == [("finish", 2), ("finish", 1)]
    assert [s.name for s in luo.incoming] == ["empty"]


def test_a_failed_implicit_finish_keeps_the_session_unretrievable():
    handler = Handler()
    handler.ready = False
    luo, log = luo_of(handler, incoming=INCOMING)
    luo.open_device()
    session = luo.retrieve_session("vm-1")
    file = luo.retrieve(session, 1)
    luo.release_session(session)
    assert file.references == 2  # held
    fails(errno.EINVAL, luo.retrieve_session, "vm-1")
    assert "implicit finish failed" in log[-1]


@pytest.mark.parametrize(
    ("incoming", "error"),
    [
        ([IncomingSession("s", (IncomingFile(1, "thing-v9", 0),))], ""),
        ([IncomingSession("s", ()), IncomingSession("s", ())], ""),
        ([IncomingSession("s", (IncomingFile(1, "thing-v1", 0), IncomingFile(1, "thing-v1", 0)))], ""),
        (None, "the record is cut short"),
    ],
    ids=["unknown-version", "name-twice", "token-twice", "unreadable"],
)
def test_a_failed_deserialisation_is_for_good(incoming, error):
    luo, log = luo_of(Handler(), incoming=incoming, error=error)
    fails(errno.EIO, luo.open_device)
    fails(errno.EIO, luo.open_device)
    assert log
