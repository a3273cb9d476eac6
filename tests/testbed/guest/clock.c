/*
 * Preloaded into the emulator: hides the host's clock, so that two runs are the same to the bit.
 * Device models read the time of day: it advances by 10 microseconds at each reading.
 */
#include <sys/time.h>
#include <time.h>

static long long now = 1700000000000000LL; /* microseconds */

static long long read_clock(void)
{
	now += 10;
	return now;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone)
{
	long long us = read_clock();

	(void)zone;
	t->tv_sec = us / 1000000;
	t->tv_usec = us % 1000000;
	return 0;
}

int clock_gettime(clockid_t id, struct timespec *t)
{
	long long us = read_clock();

	(void)id;
	t->tv_sec = us / 1000000;
	t->tv_nsec = us % 1000000 * 1000;
	return 0;
}

time_t time(time_t *p)
{
	if (p)
		*p = 1700000000;
	return 1700000000;
}

/* Its signal handler can log while the main thread holds the log's lock, and hang. */
unsigned alarm(unsigned seconds)
{
	(void)seconds;
	return 0;
}
