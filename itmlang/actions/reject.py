"""`reject`: a drop that tells the sender: a TCP reset, else ICMP's "port unreachable"."""

from dataclasses import dataclass

from itmlang.actions.action import Action


@dataclass(frozen=True)
class Reject(Action):
    words = ("reject",)
    verdict = "reject"
    # nft_reject_inet_validate, net/netfilter/nft_reject_inet.c.
    hooks = ("ingress", "prerouting", "input", "forward", "output")
    why = "the kernel sends no answer from there"

    @property
    def ending(self) -> tuple[str, ...]:
        return (
            "meta l4proto tcp reject with tcp reset",
            "reject with icmpx port-unreachable",
        )
