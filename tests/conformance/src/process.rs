//! Child processes and signals, for cases about who owns a VM and what ends with a process.
// UNSAFETY: fork and the other process calls.
#![expect(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

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
    on_alarm(nothing);
    set_alarm(microseconds, microseconds);
}

fn on_alarm(handler: extern "C" fn(i32)) {
    // SAFETY: our handlers touch nothing but the timer and a number of their own.
    unsafe { libc::signal(libc::SIGALRM, handler as libc::sighandler_t) };
}

/// SIGALRM after so many microseconds, 0 for never, and then at this interval, 0 for once.
fn set_alarm(first: i64, interval: i64) {
    let time = |microseconds| libc::timeval {
        tv_sec: 0,
        tv_usec: microseconds,
    };
    let timer = libc::itimerval {
        it_interval: time(interval),
        it_value: time(first),
    };
    // SAFETY: both arguments are valid; the old value is not wanted.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

/// What was waited for the last SIGALRM of [`with_alarms`], in microseconds.
static WAITED: AtomicI64 = AtomicI64::new(0);

extern "C" fn later(_signal: i32) {
    let waited = WAITED.load(Ordering::Relaxed);
    let next = if waited < 180 { waited + 1 } else { 90 };
    WAITED.store(next, Ordering::Relaxed);
    set_alarm(next, 0);
}

/// Calls `body` with SIGALRM at intervals from 90 to 180 microseconds: one that always meets the same place of a loop,
/// so that nothing gets done, does not stay.
pub fn with_alarms<T>(body: impl FnOnce() -> T) -> T {
    on_alarm(later);
    WAITED.store(90, Ordering::Relaxed);
    set_alarm(90, 0);
    let result = body();
    on_alarm(nothing);
    set_alarm(0, 0);
    result
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
    std::thread::sleep(Duration::from_millis(milliseconds));
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

/// This thread's number.
pub fn thread_id() -> i32 {
    // SAFETY: asks for a number.
    unsafe { libc::gettid() }
}

/// A clock of processor time: what a thread or this process has had, however many others wanted their turn meanwhile.
#[derive(Clone, Copy)]
pub struct Clock(libc::clockid_t);

impl Clock {
    /// Of this thread, for others to read.
    pub fn of_this_thread() -> Result<Self> {
        let mut id = 0;
        // SAFETY: asks which thread this is.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: this thread lives; the number is ours.
        let result = unsafe { libc::pthread_getcpuclockid(this, &raw mut id) };
        ensure!(result == 0, "pthread_getcpuclockid failed");
        Ok(Self(id))
    }

    /// Of this process. What threads that run now have had since the last tick may be missing.
    pub const fn of_this_process() -> Self {
        Self(libc::CLOCK_PROCESS_CPUTIME_ID)
    }

    /// What it shows.
    pub fn now(self) -> Duration {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the time is ours. The clock of a thread that is gone leaves it as it is.
        unsafe { libc::clock_gettime(self.0, &raw mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}

/// Processors that are online, also those that this thread may not use.
pub fn processors() -> i64 {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }
}

/// Moves a thread of this process to one processor.
pub fn place(thread: i32, processor: usize) -> Result<()> {
    // SAFETY: an empty set is all zeros.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is far below the size of the set.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: the set is valid.
    let result = unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) };
    ensure!(result == 0, "cannot run on processor {processor}");
    Ok(())
}

/// This thread runs on one processor; when this is dropped, where it could before. A thread that it makes meanwhile
/// stays there.
pub struct Placed(libc::cpu_set_t);

impl Placed {
    pub fn on(processor: usize) -> Result<Self> {
        // SAFETY: an empty set is all zeros.
        let mut before: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours; 0 is this thread.
        let result =
            unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut before) };
        ensure!(result == 0, "sched_getaffinity failed");
        place(0, processor)?;
        Ok(Self(before))
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        // SAFETY: the set is valid; 0 is this thread.
        unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) };
    }
}

unsafe extern "C" {
    /// Where the C library's registration for this thread is, from the thread's pointer on.
    static __rseq_offset: libc::ptrdiff_t;
}

/// Ends this thread's registration for restartable sequences, which the C library made. With it the kernel has work to
/// do for a thread on its way to user space after each switch of threads, so RUN ends after each; threads of older C
/// libraries and of others have none.
pub fn end_restartable_sequences() -> Result<()> {
    const UNREGISTER: i32 = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    const SIZE: u32 = 32;
    let thread: usize;
    // SAFETY: the first word of what FS points at is its own address: the thread's pointer of the ABI.
    unsafe {
        core::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
    }
    // SAFETY: the C library wrote it before `main`.
    let offset = unsafe { __rseq_offset };
    let area = thread.wrapping_add_signed(offset);
    // SAFETY: the kernel checks that this is what was registered, and forgets it.
    let result = unsafe { libc::syscall(libc::SYS_rseq, area, SIZE, UNREGISTER, SIGNATURE) };
    let error = std::io::Error::last_os_error();
    ensure!(result == 0, "rseq: {error}");
    Ok(())
}
