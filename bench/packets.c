/* The packets of a file, round and round, out of a link: past the queue and the stack of the
 * sender, each through everything behind the link before the next one leaves, on one processor.
 *
 *     packets LINK FILE PROCESSOR
 *
 * FILE: slots of SLOT bytes, the length of a frame (16 bits, as the machine has them) and the frame.
 * Every line on stdin, "FIRST COUNT", sends FIRST packets and then COUNT more that are measured;
 * what it prints is how many seconds those took on the clock and of the processor. Packets go in
 * the file's order, and go on where the line before ended.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#define SLOT 80
#define TOGETHER 32                  /* packets of a system call */
#define MOST (50 * 1000 * 1000L)     /* packets of a line: an end in any case */

static unsigned char *slots;
static long many, next;
static int link_out;

static double now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void send_packets(long count)
{
	struct mmsghdr messages[TOGETHER] = { 0 };
	struct iovec parts[TOGETHER];

	while (count > 0) {
		int filled, sent;

		for (filled = 0; filled < TOGETHER && filled < count; filled++) {
			unsigned char *slot = slots + (next + filled) % many * SLOT;

			parts[filled].iov_base = slot + 2;
			parts[filled].iov_len = *(uint16_t *)slot;
			messages[filled].msg_hdr.msg_iov = &parts[filled];
			messages[filled].msg_hdr.msg_iovlen = 1;
		}
		sent = sendmmsg(link_out, messages, filled, 0);
		if (sent < 0) {
			perror("packets");
			exit(1);
		}
		count -= sent;
		next = (next + sent) % many;
	}
}

int main(int words, char **word)
{
	struct sockaddr_ll target = { .sll_family = AF_PACKET };
	int file = words == 4 ? open(word[2], O_RDONLY) : -1, one = 1;
	long first, count;
	struct stat stat;
	cpu_set_t processors;

	if (file < 0 || fstat(file, &stat) < 0 || stat.st_size < SLOT || stat.st_size % SLOT)
		return 2;
	many = stat.st_size / SLOT;
	slots = mmap(NULL, stat.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
	CPU_ZERO(&processors);
	CPU_SET(atoi(word[3]), &processors);
	link_out = socket(AF_PACKET, SOCK_RAW, 0);   /* protocol 0: it receives nothing */
	target.sll_ifindex = if_nametoindex(word[1]);
	if (slots == MAP_FAILED || sched_setaffinity(0, sizeof processors, &processors) < 0 ||
	    bind(link_out, (struct sockaddr *)&target, sizeof target) < 0 ||
	    setsockopt(link_out, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one) < 0) {
		perror("packets");
		return 1;
	}
	while (scanf("%ld %ld", &first, &count) == 2 && first <= MOST && count <= MOST) {
		double clock, processor;

		send_packets(first);
		clock = now(CLOCK_MONOTONIC);
		processor = now(CLOCK_THREAD_CPUTIME_ID);
		send_packets(count);
		processor = now(CLOCK_THREAD_CPUTIME_ID) - processor;
		printf("%.9f %.9f\n", now(CLOCK_MONOTONIC) - clock, processor);
		fflush(stdout);
	}
	return 0;
}
