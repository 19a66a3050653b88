#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A VMM that is saved before a kexec and restored after it, by the library, on the software host.

Everything but the lines marked ``host`` is what a VMM does on a real kernel too.
"""

from iokeep.iommufd.client import READ, WRITE, Iommufd, VfioDevice
from iokeep.luo.client import LiveUpdate
from iokeep.restore.manifest import Area, DeviceEntry, FileEntry, HwptEntry, Manifest
from iokeep.restore.run import restore
from iokeep.restore.save import SEALS_WANTED, save
from iokeep.soft.host import SoftHost

RAM, IOMMUFD, HWPT, DEVICE = 1, 2, 3, 4  # tokens
SIZE = 16 << 20
CDEV = "/dev/vfio/devices/vfio0"

manifest = Manifest(
    iommufd=IOMMUFD,
    files=(FileEntry(RAM, SIZE, "ram"),),
    hwpts=(HwptEntry(HWPT),),
    devices=(DeviceEntry(DEVICE, HWPT, CDEV),),
    areas=(Area(iova=0, last=SIZE - 1, file=RAM, offset=0, prot=READ | WRITE),),
)

with SoftHost.create(64 << 20, 1, "soft-7.3") as host:  # host
    kernel = host.transport()  # host

    # Before: guest RAM in a sealed memfd, mapped by file, a device attached.
    ram = kernel.memfd_create("ram", 2)  # MFD_ALLOW_SEALING
    kernel.ftruncate(ram, SIZE)
    kernel.add_seals(ram, SEALS_WANTED)
    kernel.pwrite(ram, b"the guest's own bytes", 0x1000)
    iommufd = Iommufd(kernel)
    device = VfioDevice(kernel, CDEV)
    dev_id = device.bind(iommufd)
    ioas = iommufd.ioas_alloc()
    for area in manifest.areas:
        ioas.map_file(ram, area.offset, area.length, iova=area.iova, prot=area.prot)
    hwpt_id = iommufd.hwpt_alloc(dev_id, ioas.id)
    device.attach(hwpt_id)

    session = LiveUpdate(kernel).create("vm-1")
    save(
        kernel,
        session,
        manifest,
        files={RAM: ram},
        iommufd=iommufd,
        hwpts={HWPT: hwpt_id},
        devices={DEVICE: device},
    )
    kernel.reboot_kexec()

    host.kexec("soft-7.4")  # host
    kernel = host.transport()  # host

    # After: retrieve, replay, prove, adopt, finish.
    session = LiveUpdate(kernel).retrieve("vm-1")
    result = restore(kernel, session, "adopt")
    print(f"{result.outcome}: {result.pages} pages proved; {result.reason or 'nothing differs'}")
    live = result.live
    assert live is not None
    print(kernel.pread(live.files[RAM], 21, 0x1000).decode())
    live.close()
