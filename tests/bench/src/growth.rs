//! What more vCPUs, VMs and mappings cost those that run, and what they take of the host's memory.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::api::{Api, Exit, Vcpu, Vm};
use crate::code;
use crate::guest::{Guest, PORT, expect};
use crate::ram::Ram;
use crate::rows::{guest, sample};
use crate::sample::Samples;

const OUT: Exit = Exit::Out {
    port: PORT,
    bytes: 1,
};

/// As many as our ABI allows in a VM.
const VCPUS: u32 = 16;
/// The same of VMs.
const VMS: usize = 64;
/// VMs with all their vCPUs, as many as a program may have files.
const FULL_VMS: usize = 30;

fn out_loop<A: Api>(api: &A) -> Result<Guest<A>> {
    guest(api, code!("2: out 0x80, al", "jmp 2b"))
}

/// OUT on one of 1 and of 16 vCPUs that have all run, and on 16 in turn.
pub fn vcpus<A: Api>(api: &A) -> Result<()> {
    let guest = out_loop(api)?;
    sample("out_1_vcpu", || guest.expect(OUT))?;
    let others = others(&guest)?;
    sample("out_16_vcpus", || guest.expect(OUT))?;
    let mut turn = others.iter().chain([&guest.vcpu]).cycle();
    sample("out_16_vcpus_in_turn", || {
        expect(turn.next().context("no vCPU")?, OUT)
    })
}

/// The other vCPUs of a VM, started.
fn others<A: Api>(guest: &Guest<A>) -> Result<Vec<<A::Vm as Vm>::Vcpu>> {
    let others: Result<Vec<_>> = (1..VCPUS).map(|id| guest.vm.create_vcpu(id)).collect();
    let others = others?;
    for vcpu in &others {
        vcpu.start()?;
        expect(vcpu, OUT)?;
    }
    Ok(others)
}

/// OUT in one of 1, 16 and all VMs that have all run, and in all in turn.
pub fn vms<A: Api>(api: &A) -> Result<()> {
    let mut guests: Vec<Guest<A>> = Vec::new();
    for count in [1, 16, VMS] {
        while guests.len() < count {
            let guest = out_loop(api)?;
            guest.expect(OUT)?;
            guests.push(guest);
        }
        let first = guests.first().context("no VM")?;
        sample(&format!("out_{count}_vms"), || first.expect(OUT))?;
    }
    let mut turn = guests.iter().cycle();
    sample(&format!("out_{VMS}_vms_in_turn"), || {
        turn.next().context("no VM")?.expect(OUT)
    })
}

/// OUT and a write to device memory, one after the other, with 1 mapping and with 10,000 more.
pub fn slots<A: Api>(api: &A) -> Result<()> {
    const MOST: u64 = 10_000;
    const SLOTS: u64 = 0x1_0000_0000;
    let many = Ram::new((2 * MOST + 2) * 4096)?;
    let guest = guest(
        api,
        code!("2: out 0x80, al", "mov [0xd0000000], eax", "jmp 2b"),
    )?;
    let both = || {
        guest.expect(OUT)?;
        guest.expect(Exit::MmioWrite)
    };
    sample("out_mmio_1_slot", both)?;
    guest.vm.declare(many.address(), many.size())?;
    for slot in 0..MOST {
        // Every other page, so that no two are one range.
        let at = slot * 8192;
        let number = u32::try_from(slot + 1)?;
        let va = many.address() + at;
        guest.vm.map(number, SLOTS + at, 4096, va)?;
    }
    sample("out_mmio_10000_slots", both)
}

/// Bytes that the kernel has to give, those that it keeps aside for a processor among them.
pub fn free() -> Result<u64> {
    // Has the kernel bring its counts up to date.
    std::fs::read("/proc/sys/vm/stat_refresh").context("stat_refresh")?;
    let text = std::fs::read_to_string("/proc/zoneinfo")?;
    let mut pages = 0;
    for line in text.lines() {
        if let ["pages", "free", count] | ["count:", count] =
            line.split_whitespace().collect::<Vec<_>>().as_slice()
        {
            pages += count.parse::<u64>()?;
        }
    }
    Ok(pages * 4096)
}

/// Bytes of the host's memory for each VM, open and without memory of its own, and for each vCPU with its shared
/// pages. The mean over many, as the kernel keeps some pages aside.
pub fn memory<A: Api>(api: &A) -> Result<()> {
    let ram = Ram::new(4096)?;
    let (mut vm_bytes, mut vcpu_bytes) = (Samples::default(), Samples::default());
    for round in 0..3 {
        let before = free()?;
        let vms: Result<Vec<A::Vm>> = (0..FULL_VMS).map(|_| api.create_vm()).collect();
        let vms = vms?;
        let between = free()?;
        let mut vcpus = Vec::new();
        for vm in &vms {
            // Some VMs want to know who uses them first.
            vm.declare(ram.address(), ram.size())?;
            for id in 0..VCPUS {
                vcpus.push(vm.create_vcpu(id)?);
            }
        }
        let after = free()?;
        // The first round has what stays.
        if round > 0 {
            vm_bytes.push(before.saturating_sub(between) / FULL_VMS as u64);
            vcpu_bytes.push(between.saturating_sub(after) / vcpus.len().max(1) as u64);
        }
        drop(vcpus);
        drop(vms);
        // What is freed comes back a little later.
        std::thread::sleep(Duration::from_millis(200));
    }
    vm_bytes.print("vm_bytes");
    vcpu_bytes.print("vcpu_bytes");
    Ok(())
}
