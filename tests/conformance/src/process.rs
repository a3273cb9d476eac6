//! Child processes and signals, for cases about who owns a VM and what ends with a process.
// UNSAFETY: fork and the other process calls.
#![expect(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};

use crate::client::Node;

/// What a forked child found, told by its exit code.
pub fn in_child(body: impl FnOnce() -> u8) -> Result<u8> {
    // SAFETY: this program has one thread whenever a case forks, so the child may do anything.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork failed");
    if child == 0 {
        let code = body();
        // SAFETY: ends the child without running the parent's cleanup.
        unsafe { libc::_exit(i32::from(code)) };
    }
    let mut status = 0;
    // SAFETY: `status` is ours; the child is ours.
    let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(got == child, "waitpid failed");
    ensure!(
        libc::WIFEXITED(status),
        "the child died, status {status:#x}"
    );
    Ok(libc::WEXITSTATUS(status) as u8)
}

/// Forks a child that runs `body` and is killed once `body` has returned in it. For what a process leaves
/// behind.
pub fn killed_child(body: impl FnOnce() -> bool) -> Result<()> {
    // SAFETY: as in `in_child`.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork failed");
    if child == 0 {
        let signal = if body() { libc::SIGKILL } else { libc::SIGTERM };
        // SAFETY: kills this child.
        unsafe { libc::raise(signal) };
        // SAFETY: not reached: SIGTERM's default action ends the child as well.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` is ours; the child is ours.
    let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(got == child, "waitpid failed");
    ensure!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
        "the child could not do its part, status {status:#x}"
    );
    Ok(())
}

/// Forks; the child waits until `parent` has run here, and then tells what it sees.
pub fn after_fork(parent: impl FnOnce() -> Result<()>, child: impl FnOnce() -> u32) -> Result<u32> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    // SAFETY: this program has one thread, so the child may do anything.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork failed");
    if pid == 0 {
        let mut go = [0];
        let went = theirs.read_exact(&mut go).is_ok();
        let seen = if went { child() } else { u32::MAX };
        let told = theirs.write_all(&seen.to_le_bytes()).is_ok();
        // SAFETY: ends the child without running the parent's cleanup.
        unsafe { libc::_exit(i32::from(!told)) };
    }
    // A child that dies has closed it too.
    drop(theirs);
    let done = parent();
    ours.write_all(&[1])?;
    let mut seen = [0; 4];
    ours.read_exact(&mut seen)?;
    // SAFETY: our child; its status is not wanted.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    done?;
    Ok(u32::from_le_bytes(seen))
}

extern "C" fn nothing(_signal: i32) {}

/// Gives SIGALRM a handler that does nothing, and has it sent after so many microseconds, and again.
pub fn alarm_every(microseconds: i64) {
    let handler: extern "C" fn(i32) = nothing;
    // SAFETY: the handler touches nothing.
    unsafe { libc::signal(libc::SIGALRM, handler as libc::sighandler_t) };
    let time = libc::timeval {
        tv_sec: 0,
        tv_usec: microseconds,
    };
    let timer = libc::itimerval {
        it_interval: time,
        it_value: time,
    };
    // SAFETY: both arguments are valid; the old value is not wanted.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

/// Calls `body` with SIGALRM every so many microseconds.
pub fn with_alarm<T>(microseconds: i64, body: impl FnOnce() -> T) -> T {
    alarm_every(microseconds);
    let result = body();
    alarm_every(0);
    result
}

/// A request made by a forked child on an inherited descriptor: 0, or the errno.
pub fn request_in_child(node: &Node, request: u32, argument: u64) -> Result<u8> {
    in_child(|| match node.raw(request, argument) {
        Ok(_) => 0,
        Err(refused) => refused.0 as u8,
    })
}

/// Forks a child that runs `body`, and kills it after so many milliseconds.
pub fn killed_after(milliseconds: u64, body: impl FnOnce()) -> Result<()> {
    // SAFETY: as in `in_child`.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork failed");
    if child == 0 {
        body();
        // SAFETY: ends the child without running the parent's cleanup.
        unsafe { libc::_exit(1) };
    }
    std::thread::sleep(std::time::Duration::from_millis(milliseconds));
    // SAFETY: the child is ours and has not been waited for.
    unsafe { libc::kill(child, libc::SIGKILL) };
    let mut status = 0;
    // SAFETY: `status` is ours; the child is ours.
    let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(got == child, "waitpid failed");
    ensure!(
        libc::WIFSIGNALED(status),
        "the child ended by itself, status {status:#x}"
    );
    Ok(())
}
