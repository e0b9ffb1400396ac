"""The names of all that are timed: for the options, and so that each has one colour in plots."""

from bench import image_peers, neighbor_peers, peers, view_peers
from bench.table import OURS
from softcl.ops.backends import BACKENDS

PEERS = (
    *peers.PEERS,
    peers.AS_IT_COMES,
    *neighbor_peers.PEERS,
    *view_peers.PEERS,
    *image_peers.PEERS,
    "bare",  # a training step's networks alone
)
ALL = tuple(dict.fromkeys((*OURS, *BACKENDS, *PEERS)))
