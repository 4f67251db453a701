/* UDP packets over 64 flows, as fast as they go: the stack cuts each of many large ones (UDP_SEGMENT)
 * on the way out, which costs a fraction of sending them one by one.
 *
 *     sender ADDRESS SIZE SECONDS
 *
 * SIZE: bytes of a packet with its IP header. Prints how many were sent, and in how many seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#define FLOWS 64
#define TOGETHER 32                 /* packets of a flow, sent as one */
#define HEADERS 28                  /* IPv4, UDP */
#define MOST (50 * 1000 * 1000L)    /* packets: an end in any case */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int count, char **words)
{
	static char data[1 << 16];
	struct sockaddr_in target = { .sin_family = AF_INET };
	int udp = socket(AF_INET, SOCK_DGRAM, 0), payload;
	double begin = now(), seconds;
	long sent = 0;

	if (count != 4 || udp < 0 || inet_pton(AF_INET, words[1], &target.sin_addr) != 1)
		return 2;
	payload = atoi(words[2]) - HEADERS;
	seconds = atof(words[3]);
	if (payload < 1 || payload * TOGETHER > 65000 ||
	    setsockopt(udp, SOL_UDP, UDP_SEGMENT, &payload, sizeof payload) < 0) {
		perror("sender");
		return 1;
	}
	for (int flow = 0; sent < MOST && now() - begin < seconds; flow = (flow + 1) % FLOWS) {
		target.sin_port = htons(10000 + flow);
		if (sendto(udp, data, payload * TOGETHER, 0, (struct sockaddr *)&target,
			   sizeof target) > 0)
			sent += TOGETHER;
	}
	printf("%ld %.6f\n", sent, now() - begin);
	return 0;
}
