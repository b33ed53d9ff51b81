"""What a study runs on: how many processes share it, and the figures of a device that is not at hand."""

from __future__ import annotations

from typing import NamedTuple

from neurondrift.study.cost.pace import Pace
from neurondrift.study.cost.shape import Shape

#: Bytes a second at which processes on CPUs sum a tensor with gloo (`benchmarks/cost.py`).
GLOO = 1e9


class Devices(NamedTuple):
    """Processes that share a study, each with a device (or its part of the CPU's cores) of its own.

    Attributes
    ----------
    total
        How many.
    is_cut
        Whether the model is cut among them where it is trained and scored (FSDP2); else each holds all of it.
    link
        Bytes a second that each sends and receives while all exchange.
    cut_to_train
        Whether it is cut where all of its weights are trained, also if it is not elsewhere.
    """

    total: int = 1
    is_cut: bool = False
    link: float = GLOO
    cut_to_train: bool = False

    def training(self, *, full: bool) -> Devices:
        """The processes while an adapter or all weights are trained."""
        return self._replace(is_cut=self.is_cut or (full and self.cut_to_train))

    def summing(self, size: float) -> float:
        """Seconds in which a tensor of so many bytes is summed over all, by rings: each sends it about twice."""
        return 2 * self.gathering(size)

    def gathering(self, size: float) -> float:
        """Seconds in which all have all of a tensor of so many bytes of which each has a part."""
        return size * (self.total - 1) / self.total / self.link

    def share(self, items: float) -> float:
        """How much of some items the process with the most has."""
        return -(-items // self.total)


ALONE = Devices()


class Hardware(NamedTuple):
    """A device, and what programs reach on it.

    Attributes
    ----------
    name
        Of the device.
    memory
        Bytes.
    products
        Floating-point operations a second of dense products in bfloat16.
    traffic
        Bytes a second between its memory and its processor.
    link
        Bytes a second to the others of its machine, in one direction.
    launch
        Seconds that one block takes at least to decode one token: its kernels are started one by one.
    each_weight
        Bytes that move for each scored weight and example: its gradient, the absolute value, the sum.
    ordering
        Seconds in which the machine's CPU puts one number in order among many.
    """

    name: str
    memory: float
    products: float
    traffic: float
    link: float
    launch: float
    each_weight: float
    ordering: float


#: SXM5 with 80 GB. NVIDIA's data sheet (989 TFLOP/s without sparsity, 3.35 TB/s, NVLink 450 GB/s in one direction)
#: times shares that are assumed, as is `launch`; `each_weight` is from scores of Llama-2-7B that were timed on one
#: (benchmarks/README.md); `ordering` is a fourth of two cores' time.
H100 = Hardware(
    name="H100 80 GB",
    memory=80e9,
    products=0.4 * 989e12,
    traffic=0.6 * 3.35e12,
    link=0.7 * 450e9,
    launch=7e-4,
    each_weight=61.0,
    ordering=3e-8,
)


def pace_on(shape: Shape, hardware: Hardware, *, itemsize: int = 2, cached: float = 300.0) -> Pace:
    """The pace that a device would have: two operations for each weight and token forward, twice as many back (of an
    adapter once: the weights need no gradient), and all that is read from memory once for each token that is decoded.

    Parameters
    ----------
    shape
        Of the model.
    hardware
        The device.
    itemsize
        Bytes of a weight.
    cached
        Tokens whose keys and values are read for each token that is decoded.
    """
    products, traffic = hardware.products, hardware.traffic
    head = shape.vocabulary * shape.hidden
    forward, forward_head = 2 * shape.blocks / products, 2 * head / products
    return Pace(
        train=3 * forward,
        adapt=2 * forward,
        score=3 * forward,
        read=forward,
        train_head=3 * forward_head,
        adapt_head=2 * forward_head,
        read_head=forward_head,
        update=36 / traffic,  # weight, gradient and two moments are read, three of them written, and the norm taken
        step=max((shape.blocks + head) * itemsize / traffic, shape.layers * hardware.launch),
        row=forward + forward_head + shape.cached * cached * itemsize / traffic,
        order=hardware.ordering,
        score_row=shape.blocks * hardware.each_weight / traffic,
    )
