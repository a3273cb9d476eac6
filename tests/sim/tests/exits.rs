//! The table of exit reasons: complete, the same as the page in `docs`, and
//! what the core does.

use abi::tunnel::ExitStatus;
use sim::client::Client;
use sim::{Machine, Profile, Step};
use vmx::arch::exit::ExitReason;
use vmx::caps::{Refusal, examine};
use vmx::host::Host;
use vmx::vcpu::exit_table::{Answer, Control};

const PAGE: &str = include_str!("../../../docs/exits.md");

fn word(answer: Answer) -> &'static str {
    match answer {
        Answer::Handled => "Handled",
        Answer::Skipped => "Skipped",
        Answer::Undefined => "Undefined",
        Answer::Fails => "Fails",
        Answer::Off(_) => "Off",
        Answer::Outside => "Outside",
        Answer::Unused => "Unused",
    }
}

fn all() -> impl Iterator<Item = (u16, Answer)> {
    (0u16..)
        .take(ExitReason::COUNT)
        .map(|n| (n, Answer::to(ExitReason(n))))
}

#[test]
fn every_reason_has_an_answer_and_a_row_in_the_docs() {
    let rows: Vec<Vec<&str>> = PAGE
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| reason"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), ExitReason::COUNT);
    for ((number, answer), row) in all().zip(rows) {
        let reason = ExitReason(number);
        let named = ExitReason::NAMED.iter().any(|(named, _)| *named == reason);
        assert_eq!(named, answer != Answer::Unused, "{number}");
        let text = if named { reason.text() } else { "" };
        assert_eq!(row[1], number.to_string());
        assert_eq!(row[2], text, "{number}");
        let first = row[3].split(':').next().unwrap();
        assert_eq!(first, word(answer), "{number}");
    }
    // The manual's last.
    assert_eq!(Answer::to(ExitReason(80)), Answer::Unused);
}

/// What the table says happens when the exit comes, whatever the controls say.
#[test]
fn the_core_does_what_the_table_says() {
    for (number, answer) in all() {
        let client = Client::protected();
        let rip = client.regs().rip;
        match answer {
            Answer::Undefined => {
                client.run([Step::exits(number, 0, 3)]);
                let received = client.machine.take_received();
                assert_eq!(received.first().map(|e| e.vector), Some(6), "{number}");
            }
            Answer::Skipped => {
                client.run([Step::exits(number, 0, 3)]);
                assert_eq!(client.regs().rip, rip + 3, "{number}");
                assert_eq!(client.machine.take_received().len(), 0);
            }
            Answer::Off(_) | Answer::Outside | Answer::Unused => {
                let status = client.run([Step::exits(number, 0, 3)]);
                assert_eq!(status, ExitStatus::StateChange, "{number}");
            }
            Answer::Fails | Answer::Handled => {}
        }
        client.finish();
    }
    let client = Client::protected();
    // INIT is no guest's: RUN returns, and goes on.
    assert_eq!(client.run([Step::exits(3, 0, 0)]), ExitStatus::Interrupt);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    client.finish();
}

/// A processor on which a control that must be 0 cannot be 0 is refused.
#[test]
fn controls_that_must_be_off_are_demanded_off() {
    for (number, answer) in all() {
        let Answer::Off(control) = answer else {
            continue;
        };
        let (registers, bit) = match control {
            Control::Pin(pin) => ([0x481, 0x48d], pin.bits().trailing_zeros()),
            Control::Primary(primary) => ([0x482, 0x48e], primary.bits().trailing_zeros()),
            Control::Secondary(bit) => ([0x48b, 0x48b], u32::from(bit)),
            // Not activated, or a bitmap of zeros.
            Control::Tertiary | Control::XssBitmap => continue,
        };
        let mut profile = Profile::haswell();
        for register in registers {
            let value = profile.msrs.get_mut(&register).unwrap();
            *value |= 1 << bit | 1 << (bit + 32);
        }
        let machine = Machine::new(profile, 1);
        let refusal = examine(machine.host().cpu()).expect_err("a processor of no use");
        let Refusal::Control { stuck, .. } = refusal else {
            panic!("{number}: {refusal:?}");
        };
        assert_eq!(stuck, 1 << bit, "{number}");
    }
}
