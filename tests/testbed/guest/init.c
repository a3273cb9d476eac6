/*
 * /init of the emulated PC: mounts what programs expect, runs /steps, reports its exit code and
 * the instruction counts on the serial line, and powers off. The same program under the name
 * "tick" prints the time-stamp counter, for scripts that measure.
 *
 * Lines it writes, each at the start of a line (outcome.rs reads them):
 *   @@TICKS init N     the counter when /init started
 *   @@TICKS steps N    what /steps took
 *   @@EXIT N           exit code of /steps; 128 + signal if a signal ended it
 */
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static unsigned long long ticks(void)
{
	unsigned lo, hi;

	__asm__ volatile("lfence; rdtsc" : "=a"(lo), "=d"(hi) : : "memory");
	return (unsigned long long)hi << 32 | lo;
}

/* Mounts TYPE on PATH; a kernel without it is no reason to stop. */
static void attach(const char *type, const char *path)
{
	mkdir(path, 0755);
	if (mount(type, path, type, 0, NULL))
		dprintf(1, "init: no %s\n", type);
}

static void console(void)
{
	struct termios t;
	int fd = open("/dev/console", O_RDWR);

	if (fd < 0)
		return;
	dup2(fd, 0);
	dup2(fd, 1);
	dup2(fd, 2);
	if (fd > 2)
		close(fd);
	/* Bytes go out as they are: the log is compared byte by byte. */
	if (!tcgetattr(1, &t)) {
		t.c_oflag &= ~(tcflag_t)(OPOST | ONLCR);
		tcsetattr(1, TCSANOW, &t);
	}
}

/* Runs /steps and returns its exit code. */
static int steps(void)
{
	static char *env[] = { "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/", "TERM=dumb", NULL };
	static char *with_shell[] = { "/bin/sh", "/steps", NULL };
	static char *alone[] = { "/steps", NULL };
	int status, died;
	pid_t pid = fork();

	if (pid < 0)
		return 125;
	if (pid == 0) {
		/* No controlling terminal: losing it at the end would throw away what is not sent yet. */
		if (!access("/bin/sh", X_OK))
			execve(with_shell[0], with_shell, env);
		else
			execve(alone[0], alone, env);
		perror("init: /steps");
		_exit(127);
	}
	/* Orphans end up here as well: wait until it is the right one. */
	do
		died = wait(&status);
	while (died != pid && died > 0);
	if (died < 0)
		return 125;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv)
{
	unsigned long long at_init = ticks(), at_steps;
	struct timespec pause = { 0, 20 * 1000 * 1000 };
	int code;

	if (getpid() != 1) {
		printf("@@TICK %s %llu\n", argc > 1 ? argv[1] : "-", at_init);
		return 0;
	}
	(void)argv;
	attach("devtmpfs", "/dev");
	console();
	attach("proc", "/proc");
	attach("sysfs", "/sys");
	attach("tmpfs", "/tmp");
	mkdir("/dev/shm", 01777);
	dprintf(1, "@@TICKS init %llu\n", at_init);

	at_steps = ticks();
	code = steps();
	at_steps = ticks() - at_steps;

	dprintf(1, "\n@@TICKS steps %llu\n@@EXIT %d\n", at_steps, code);
	/* The serial port is interrupt-driven and power-off does not wait for it. */
	tcdrain(1);
	nanosleep(&pause, NULL);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	for (;;)
		sleep(1);
}
