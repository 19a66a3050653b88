# SPDX-License-Identifier: Apache-2.0
"""Save and restore on the software host: by every policy, refused, undone, and carried on by another."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from restore_support import AREAS, MANIFEST, MIB, Died, Dying, Vmm

from iokeep.errors import KernelRefused, UsageError
from iokeep.restore.manifest import MANIFEST_TOKEN, Area
from iokeep.restore.policies import POLICIES, policy_of
from iokeep.restore.run import restore

MAPPED = sum(a.length for a in AREAS) // 4096


@pytest.fixture
def vmms():
    made = []

    def make(*args, **kw):
        vmm = Vmm(*args, **kw)
        made.append(vmm)
        return vmm

    yield make
    for vmm in made:
        vmm.host.stop()


@pytest.fixture
def vmm(vmms):
    return vmms()


@pytest.fixture
def saved(vmm):
    vmm.save()
    vmm.kexec(params={"unsafe_adopt": 1})
    return vmm


def give_back(vmm, live):
    """What a restored guest does at its end; everything must be free then."""
    for a in live.manifest.areas:
        assert live.ioases[0].unmap(a.iova, a.length) == a.length
    for d in live.devices.values():
        d.detach()
    live.iommufd.destroy(live.hwpts[0x20])
    live.iommufd.destroy(live.ioases[0].id)
    live.close()
    vmm.session.close()
    audit = vmm.audit()
    assert (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts) == (0, 0, 0, 0)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_restores_a_sound_guest(saved, policy):
    transport, session, _ = saved.process()
    steps = []
    watch = lambda step, done, total: steps.append(step)  # noqa: E731
    result = restore(transport, session, policy, unsafe=policy == "trust", watch=watch)
    assert result.outcome == "restored"
    assert result.reason == ""
    assert result.areas == len(AREAS)
    assert result.pages == (0 if policy in ("trust", "deferred") else MAPPED)
    wanted = ["retrieve", "replay", "validate", POLICIES[policy].take, "finish"]
    if policy in ("trust", "deferred"):
        wanted.remove("validate")
    assert [s.name for s in result.steps] == wanted
    assert list(dict.fromkeys(steps)) == wanted
    assert result.journal[-1].split()[1] == "FINISHED"
    session.close()
    give_back(saved, result.live)


@pytest.mark.parametrize("policy", ["rebuild", "adopt"])
@pytest.mark.parametrize(
    ("areas", "iova", "reason"),
    [
        (AREAS[1:], 0, "extra"),
        ((*AREAS, Area(0x5000_0000, 0x5000_0FFF, 1, 0, 3)), 0x5000_0000, "missing"),
        ((AREAS[0], replace(AREAS[1], prot=3), AREAS[2]), 0x1000_0000, "prot"),
        ((*AREAS[:2], replace(AREAS[2], offset=2 * MIB)), 0x2000_1000, "pa"),
    ],
)
def test_what_is_not_the_same_is_refused_by_name_and_undone(saved, policy, areas, iova, reason):
    transport, session, _ = saved.process()
    before = saved.audit().allocated
    result = restore(transport, session, policy, areas=areas)
    assert result.outcome == "refused"
    assert (result.mismatches[0].iova, result.mismatches[0].reason) == (iova, reason)
    assert result.total_mismatches >= len(result.mismatches)
    assert result.journal[-1].split()[1] == "REFUSED"
    assert "finish" not in [s.name for s in result.steps]
    assert saved.audit().allocated == before
    result.live.close()
    # The VMM sees its mistake and does it right.
    again = restore(transport, session, policy)
    assert again.outcome == "restored"
    session.close()
    give_back(saved, again.live)


def test_areas_that_cannot_be_are_a_usage_error_and_undone(saved):
    transport, session, _ = saved.process()
    with pytest.raises(UsageError, match="file token 0x9"):
        restore(transport, session, "adopt", areas=[Area(0, 0xFFF, 9, 0, 3)])
    assert restore(transport, session, "adopt").outcome == "restored"


def test_another_policy_may_follow_a_refusal(saved):
    transport, session, _ = saved.process()
    result = restore(transport, session, "adopt", areas=AREAS[1:])
    assert result.outcome == "refused"
    result.live.close()
    assert restore(transport, session, "rebuild").outcome == "restored"


def test_trust_is_refused_by_a_kernel_that_was_not_booted_for_it(vmm):
    vmm.save()
    vmm.kexec()
    transport, session, _ = vmm.process()
    result = restore(transport, session, "trust", unsafe=True)
    assert result.outcome == "refused"
    assert "EPERM" in result.reason
    result.live.close()
    assert restore(transport, session, "adopt").outcome == "restored"


def test_a_damaged_manifest_is_refused(saved):
    transport, session, _ = saved.process()
    fd = session.retrieve(MANIFEST_TOKEN)
    transport.pwrite(fd, b"\xff", 200)
    result = restore(transport, session, "adopt")
    assert result.outcome == "refused"
    assert "digest" in result.reason


def finish_after_a_death(vmm, policy):
    """The next process carries on, and nothing is left behind."""
    transport, session, _ = vmm.process()
    result = restore(transport, session, policy)
    assert result.outcome == "restored", result.reason
    assert result.pages == MAPPED
    session.close()
    vmm.host.settle()
    give_back(vmm, result.live)
    return result.resumed


@pytest.mark.parametrize("policy", ["rebuild", "adopt"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_vmm_that_dies_at_any_call_is_carried_on(policy, behind):
    resumed = set()
    for at in range(1, 400):
        vmm = Vmm()
        try:
            vmm.save()
            vmm.kexec()
            transport, session, real = vmm.process(at, behind)
            try:
                restore(transport, session, policy)
                break
            except Died:
                real.disconnect()
            if not finished(vmm):
                resumed.add(finish_after_a_death(vmm, policy)[:4])
        finally:
            vmm.host.stop()
    assert at > 20
    assert {"", "undi", "went"} <= resumed


def finished(vmm):
    """The process died between FINISH and its note of it: nothing is left to restore, and that is said."""
    transport, session, real = vmm.process()
    try:
        real.close(session.retrieve(MANIFEST_TOKEN))
    except KernelRefused:
        result = restore(transport, session)
        assert result.outcome == "refused"
        assert "finished already" in result.reason
        return True
    return False


@pytest.mark.parametrize("policy", ["rebuild", "adopt"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_chain_of_deaths_is_carried_on(vmm, policy, behind):
    """On one host processes die at their 1st, 2nd, 3rd ... call, in the undo of the one before too."""
    vmm.save()
    vmm.kexec()
    for at in range(1, 400):
        transport, session, real = vmm.process(at, behind)
        try:
            result = restore(transport, session, policy)
        except Died:
            real.disconnect()
            continue
        break
    assert result.outcome == "restored", result.reason
    assert at > 10
    assert result.pages == MAPPED
    session.close()
    vmm.host.settle()
    give_back(vmm, result.live)


def test_policies_are_checked():
    assert policy_of("adopt").take == "adopt"
    with pytest.raises(UsageError, match="no policy"):
        policy_of("x")
    assert [name for name, p in POLICIES.items() if p.later] == ["deferred", "sealed"]
    with pytest.raises(UsageError, match="unseen"):
        policy_of("trust")
    assert policy_of("trust", unsafe=True).prove == ""


# ---- before the kexec


def test_a_cancelled_save_leaves_everything_mutable(vmm):
    saved = vmm.save()
    with pytest.raises(KernelRefused, match="EBUSY"):
        vmm.ioas.unmap(0, 4 * MIB)
    saved.cancel()
    saved.cancel()
    vmm.ioas.unmap(AREAS[0].iova, AREAS[0].length)
    vmm.ioas.map_file(vmm.files[1], 0, 4 * MIB, iova=0, prot=3)
    vmm.save()
    vmm.kexec()
    transport, session, _ = vmm.process()
    assert restore(transport, session).outcome == "restored"


def test_all_that_is_wrong_is_said_before_anything_is_done(vmm):
    t = vmm.transport
    loose = t.memfd_create("loose", 3)
    t.ftruncate(loose, 8 * MIB)
    session = vmm.luo.create("vm-1")
    with pytest.raises(UsageError) as e:
        vmm.save(files={1: loose, 2: vmm.files[1]}, hwpts={}, session=session)
    for text in ("seals 0x0", "has 0x800000 bytes, the manifest says 0x10000", "HWPT token 0x20"):
        assert text in e.value.what
    # Nothing was preserved: the same session takes the good files.
    vmm.save(session=session)


def test_a_kernel_that_says_no_ends_the_session(vmm):
    short = replace(MANIFEST, files=MANIFEST.files[:1], areas=(AREAS[0], AREAS[2]))
    with pytest.raises(KernelRefused, match="nothing is preserved"):
        vmm.save(short, files={1: vmm.files[1]})  # the rom is mapped, but not in the session
    vmm.ioas.unmap(0, 4 * MIB)


@pytest.mark.parametrize("behind", [False, True])
def test_a_vmm_that_dies_while_saving_can_save_again(vmms, behind):
    for at in range(1, 100):
        vmm = vmms()
        real = vmm.transport
        session = vmm.luo.create("vm-1")
        session.transport = vmm.iommufd.transport = vmm.transport = Dying(real, at, behind)
        try:
            vmm.save(session=session)
            break
        except Died:
            session.transport = vmm.iommufd.transport = vmm.transport = real
        session.close()
        vmm.save()
        vmm.kexec()
        transport, session, _ = vmm.process()
        assert restore(transport, session).outcome == "restored"
    assert at > 6
