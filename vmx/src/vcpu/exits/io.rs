//! Port I/O. One element goes to the client at once; strings go through the
//! instruction emulator, which reads and writes guest memory.

use abi::tunnel::{ExitStatus, IoDirection, TunnelIo};

use super::{Next, Work, advance_here};
use crate::arch::exit::IoQualification;
use crate::host::Host;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

#[inline(always)]
pub fn handle<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    access: IoQualification,
) -> Next {
    if access.is_string() {
        return Next::Work(Work::Emulate);
    }
    let size = access.size();
    let direction = if access.is_in() {
        inner.pending_in = Some(size);
        IoDirection::In
    } else {
        let [value, ..] = inner.registers.general.gpr;
        vcpu.channel.set_element(value, size);
        IoDirection::Out
    };
    let view = TunnelIo {
        direction: direction as u8,
        size: u16::from(size),
        port: access.port(),
        count: 1,
        ..TunnelIo::default()
    };
    vcpu.channel.set_view_words(zerocopy::transmute!(view));
    advance_here(inner, current);
    Next::Leave(ExitStatus::Io)
}

impl<H: Host> Inner<H> {
    /// Finishes an IN with what the client read: AL and AX keep the rest of
    /// RAX, EAX clears it (SDM vol. 1, 3.4.1.1 "General-Purpose Registers in
    /// 64-Bit Mode").
    pub(in crate::vcpu) fn finish_in(&mut self, size: u8, data: [u8; 4]) {
        let value = u64::from(u32::from_le_bytes(data));
        let old = self.registers.general.gpr[0];
        let new = match size {
            1 => (old & !0xff) | (value & 0xff),
            2 => (old & !0xffff) | (value & 0xffff),
            _ => value,
        };
        self.registers.set(0, new);
    }
}
