"""The lock of a device."""

from __future__ import annotations

from threading import Event, Thread

from forge.backend.device_lock import DeviceLock


def test_who_waits_for_another_thread_lets_it_have_the_lock() -> None:
    lock, order, done = DeviceLock(), list[str](), Event()

    def other() -> None:
        with lock.held():
            order.append("other")
            assert lock.is_mine
        done.set()

    with lock.held(), lock.held():
        thread = Thread(target=other)
        thread.start()
        assert not done.wait(0.05)
        order.append("mine")
        with lock.released():
            assert not lock.is_mine
            assert done.wait(10)
        assert lock.is_mine
        thread.join()
        late = Thread(target=other)
        late.start()  # it is held again, as often as before
        with lock.held():
            order.append("mine again")
        order.append("still mine")
    late.join(10)
    assert order == ["mine", "other", "mine again", "still mine", "other"]
    assert not lock.is_mine


def test_who_does_not_hold_it_releases_nothing() -> None:
    lock = DeviceLock()
    with lock.released():
        assert not lock.is_mine
    with lock.held():
        assert lock.is_mine
