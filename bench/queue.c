/* The least that a program can do with a queue: accept each packet, clear the class bits of its
 * mark. By libnetfilter_queue, one packet at a time, as its own examples do it.
 *
 *     queue NUMBER
 */
#include <arpa/inet.h>
#include <errno.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#define CLASS_BITS 0x0f000000
#define LENGTH 4096         /* packets, as runtime.netqueue.Settings has it */
#define BUFFER (8 << 20)    /* bytes, likewise */

static int serve(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *packet,
                 void *unused)
{
	struct nfqnl_msg_packet_hdr *header = nfq_get_msg_packet_hdr(packet);
	uint32_t mark = nfq_get_nfmark(packet) & ~CLASS_BITS;

	return nfq_set_verdict2(queue, ntohl(header->packet_id), NF_ACCEPT, mark, 0, NULL);
}

int main(int count, char **words)
{
	static char message[1 << 17] __attribute__((aligned(8)));
	struct nfq_handle *library = nfq_open();
	struct nfq_q_handle *queue;
	int size = BUFFER, got;

	if (count != 2 || !library)
		return 2;
	queue = nfq_create_queue(library, atoi(words[1]), serve, NULL);
	if (!queue || nfq_set_mode(queue, NFQNL_COPY_PACKET, 0xffff) < 0 ||
	    nfq_set_queue_maxlen(queue, LENGTH) < 0 ||
	    nfq_set_queue_flags(queue, NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_FAIL_OPEN) < 0 ||
	    setsockopt(nfq_fd(library), SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0) {
		perror("queue");
		return 1;
	}
	for (;;) {
		got = recv(nfq_fd(library), message, sizeof message, 0);
		if (got >= 0)
			nfq_handle_packet(library, message, got);
		else if (errno != ENOBUFS && errno != EINTR)
			return 1;
	}
}
