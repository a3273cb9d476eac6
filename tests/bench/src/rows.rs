//! The rows.

use anyhow::{Result, ensure};

use crate::api::{Api, Exit, Vcpu, Vm, request};
use crate::growth;
use crate::guest::{self, Guest, OTHER_PORT, PORT, RAM_SIZE, STRING, VECTOR};
use crate::mark;
use crate::ram::Ram;
use crate::sample::{Samples, ticks};
use crate::{code, measured, memory};

/// Samples of the rows that this program measures, after as many to warm up.
const ROUNDS: usize = 256;

/// A group of rows and what measures it.
pub(crate) type Row<A> = (&'static str, fn(&A) -> Result<()>);

/// Measures all rows whose group's name contains one of the filter's words, which commas separate; returns how many
/// could not be.
pub fn all<A: Api>(filter: &str) -> u32 {
    let rows: [Row<A>; 19] = [
        ("null", null),
        ("out", out),
        ("in", input),
        ("mmio_write", mmio_write),
        ("mmio_read", mmio_read),
        ("mmio_test", mmio_test),
        ("outs", outs),
        ("hlt_wake", hlt_wake),
        ("inject", inject),
        ("cpuid", cpuid),
        ("msr", msr),
        ("cr", control_registers),
        ("cr8", task_priority),
        ("create_vm", create_vm),
        ("create_vcpu", create_vcpu),
        ("growth_vcpus", growth::vcpus),
        ("growth_vms", growth::vms),
        ("growth_slots", growth::slots),
        ("growth_memory", growth::memory),
    ];
    let mut failed = 0;
    let wanted = |name: &str| filter.split(',').any(|word| name.contains(word));
    let rows = rows.into_iter().chain(memory::rows::<A>());
    for (name, row) in rows.filter(|row| wanted(row.0)) {
        if let Err(error) = A::open().and_then(|api| row(&api)) {
            println!("@@FAILED {name}: {error:#}");
            failed += 1;
        }
    }
    failed
}

/// A guest with memory in 4 KB pages.
pub fn guest<A: Api>(api: &A, code: &[u8]) -> Result<Guest<A>> {
    Guest::new(api, code, Ram::new(RAM_SIZE)?)
}

/// Samples of one body.
pub fn sample(name: &str, mut body: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..ROUNDS {
        body()?;
    }
    let mut samples = Samples::default();
    mark::row(Some(name));
    for _ in 0..ROUNDS {
        mark::begin();
        let (ticks, result) = ticks(&mut body);
        mark::end();
        result?;
        samples.push(ticks);
    }
    mark::row(None);
    samples.print(name);
    Ok(())
}

/// The measurement itself, a system call, and an ioctl that neither driver knows.
fn null<A: Api>(api: &A) -> Result<()> {
    sample("nothing", || Ok(()))?;
    sample("bad_descriptor", || {
        ensure!(request(-1, 0, 0) < 0, "an ioctl on no file");
        Ok(())
    })?;
    let guest = guest(api, code!("hlt"))?;
    sample("null_ioctl", || {
        ensure!(request(guest.vcpu.fd(), 0, 0) < 0, "an unknown ioctl");
        Ok(())
    })
}

fn out<A: Api>(api: &A) -> Result<()> {
    let guest = guest(api, code!("2: out 0x80, al", "jmp 2b"))?;
    let wanted = Exit::Out {
        port: PORT,
        bytes: 1,
    };
    sample("out", || guest.expect(wanted))
}

fn input<A: Api>(api: &A) -> Result<()> {
    let guest = guest(api, code!("2: in eax, 0x80", "jmp 2b"))?;
    guest.expect(Exit::In { port: PORT })?;
    sample("in", || {
        guest.vcpu.answer(7);
        guest.expect(Exit::In { port: PORT })
    })
}

fn mmio_write<A: Api>(api: &A) -> Result<()> {
    let guest = guest(api, code!("2: mov [0xd0000000], eax", "jmp 2b"))?;
    sample("mmio_write", || guest.expect(Exit::MmioWrite))
}

fn mmio_read<A: Api>(api: &A) -> Result<()> {
    let guest = guest(api, code!("2: mov eax, [0xd0000000]", "jmp 2b"))?;
    guest.expect(Exit::MmioRead)?;
    sample("mmio_read", || {
        guest.vcpu.answer(7);
        guest.expect(Exit::MmioRead)
    })
}

/// A driver that waits for a bit of a device's register.
fn mmio_test<A: Api>(api: &A) -> Result<()> {
    let code = code!("2: test dword ptr [0xd0000000], 0x100", "jz 2b", "hlt");
    let guest = guest(api, code)?;
    guest.expect(Exit::MmioRead)?;
    sample("mmio_test", || {
        guest.vcpu.answer(7);
        guest.expect(Exit::MmioRead)
    })
}

/// REP OUTSB of 4096 bytes, up to the OUT behind it.
fn outs<A: Api>(api: &A) -> Result<()> {
    let guest = guest(
        api,
        code!(
            "cld",
            "mov edx, 0x80",
            "2: mov esi, 0x20000",
            "mov ecx, 4096",
            "rep outsb",
            "out 0x81, al",
            "jmp 2b",
        ),
    )?;
    guest.ram.touch(0x20000, STRING as u64);
    let mut exits = Samples::default();
    let mut samples = Samples::default();
    mark::row(Some("outs"));
    for round in 0..8 {
        let (mut sent, mut count) = (0, 0);
        mark::begin();
        let (ticks, result) = ticks(|| {
            loop {
                match guest.run()? {
                    Exit::Out { port: PORT, bytes } => {
                        sent += bytes;
                        count += 1;
                    }
                    Exit::Out {
                        port: OTHER_PORT, ..
                    } => return Ok(()),
                    exit => anyhow::bail!("{exit:?}"),
                }
            }
        });
        mark::end();
        result?;
        ensure!(sent == STRING, "{sent} bytes of {STRING}");
        if round >= 3 {
            samples.push(ticks);
            exits.push(count);
        }
    }
    mark::row(None);
    samples.print("outs_4096");
    exits.print("outs_4096_exits");
    Ok(())
}

/// From HLT through INTERRUPT and the handler, without its OUT, to the next HLT.
fn hlt_wake<A: Api>(api: &A) -> Result<()> {
    let guest = guest(
        api,
        // The handler here is only a return.
        code!("sti", "2: hlt", "jmp 2b"),
    )?;
    guest.ram.write(guest::STACK + 0x100, &[0xcf]);
    guest.expect(Exit::Halt)?;
    sample("hlt_wake", || {
        guest.vcpu.interrupt(VECTOR)?;
        guest.expect(Exit::Halt)
    })
}

/// INTERRUPT to the handler's first instruction, which tells of itself with an OUT.
fn inject<A: Api>(api: &A) -> Result<()> {
    let guest = guest(api, code!("sti", "2: out 0x80, al", "jmp 2b"))?;
    let main = Exit::Out {
        port: PORT,
        bytes: 1,
    };
    let handler = Exit::Out {
        port: OTHER_PORT,
        bytes: 1,
    };
    guest.expect(main)?;
    guest.expect(main)?;
    let mut samples = Samples::default();
    mark::row(Some("inject"));
    for round in 0..2 * ROUNDS {
        mark::begin();
        let (ticks, result) = ticks(|| {
            guest.vcpu.interrupt(VECTOR)?;
            guest.expect(handler)
        });
        mark::end();
        result?;
        guest.expect(main)?;
        if round >= ROUNDS {
            samples.push(ticks);
        }
    }
    mark::row(None);
    samples.print("inject");
    Ok(())
}

/// A guest that measures itself.
fn inside<A: Api>(api: &A, name: &str, code: &[u8]) -> Result<()> {
    let guest = guest(api, code)?;
    inside_of(&guest, name)
}

fn inside_of<A: Api>(guest: &Guest<A>, name: &str) -> Result<()> {
    samples_of(guest, name)?.print(name);
    Ok(())
}

/// What a guest that measures by itself has measured.
pub(crate) fn samples_of<A: Api>(guest: &Guest<A>, name: &str) -> Result<Samples> {
    mark::row(Some(name));
    guest.expect(Exit::Halt)?;
    mark::row(None);
    Ok(guest.results().collect())
}

fn cpuid<A: Api>(api: &A) -> Result<()> {
    inside(api, "guest_nothing", measured!())?;
    let code = measured!("mov eax, 1", "cpuid");
    // CPUID overwrites EBX, which no other piece needs.
    inside(api, "cpuid", code)
}

/// IA32_PAT has to be caught; IA32_SYSENTER_CS does not.
fn msr<A: Api>(api: &A) -> Result<()> {
    inside(api, "rdmsr", measured!("mov ecx, 0x277", "rdmsr"))?;
    inside(
        api,
        "wrmsr",
        measured!(
            "mov ecx, 0x277",
            "mov eax, 0x00070406",
            "mov edx, eax",
            "wrmsr"
        ),
    )?;
    inside(
        api,
        "wrmsr_sysenter",
        measured!("mov ecx, 0x174", "xor eax, eax", "xor edx, edx", "wrmsr"),
    )
}

fn control_registers<A: Api>(api: &A) -> Result<()> {
    inside(
        api,
        "cr0_ts",
        measured!("mov eax, cr0", "xor eax, 8", "mov cr0, eax"),
    )?;
    inside(
        api,
        "cr0_wp",
        measured!("mov eax, cr0", "xor eax, 0x10000", "mov cr0, eax"),
    )?;
    inside(
        api,
        "cr0_cd",
        measured!("mov eax, cr0", "xor eax, 0x40000000", "mov cr0, eax"),
    )?;
    inside(
        api,
        "cr4_pge",
        measured!("mov eax, cr4", "xor eax, 0x80", "mov cr4, eax"),
    )?;
    inside(
        api,
        "cr4_pae",
        measured!("mov eax, cr4", "xor eax, 0x20", "mov cr4, eax"),
    )
}

/// As 64-bit Windows raises and lowers its IRQL.
fn task_priority<A: Api>(api: &A) -> Result<()> {
    let code = measured!(
        64: "mov rcx, cr8", "mov eax, 13", "mov cr8, rax", "mov cr8, rcx",
    );
    let guest = guest(api, code)?;
    guest.write_page_tables();
    inside_of(&guest, "cr8")
}

/// A VM beside another one, and its end.
fn create_vm<A: Api>(api: &A) -> Result<()> {
    let _first = api.create_vm()?;
    let (mut created, mut closed) = (Samples::default(), Samples::default());
    for _ in 0..15 {
        let (up, vm) = ticks(|| api.create_vm());
        let vm = vm?;
        let (down, ()) = ticks(|| drop(vm));
        created.push(up);
        closed.push(down);
    }
    created.print("vm_create");
    closed.print("vm_close");
    Ok(())
}

fn create_vcpu<A: Api>(api: &A) -> Result<()> {
    let _first = api.create_vm()?;
    let mut samples = Samples::default();
    for _ in 0..15 {
        let vm = api.create_vm()?;
        let (ticks, vcpu) = ticks(|| vm.create_vcpu(0));
        drop(vcpu?);
        samples.push(ticks);
    }
    samples.print("vcpu_create");
    Ok(())
}
