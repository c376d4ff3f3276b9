"""The native part, written in Rust. See `samtone` for what is meant to be called."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

__version__: str

class SamtoneError(ValueError):
    """A call was refused; the sentence names the argument, its value and what is allowed."""

class Settings:
    """Loss and options of a call."""

    def __new__(cls, text: str, temperature: float) -> Settings: ...

class CudaPlan:
    """What one call launches on a CUDA device."""

    def __new__(
        cls,
        settings: Settings,
        query: Any,
        passage: Any,
        annotations: Mapping[str, Any],
        wanted: tuple[bool, bool],
        at_once: bool,
    ) -> CudaPlan: ...
    state_bytes: int
    workspace_bytes: int
    offsets: tuple[int, int, int]
    results: tuple[int, int]
    def side(self) -> bytes: ...
    def forward(self, towers: tuple[Any, Any], side: Any, state: Any, workspace: Any, stream: int) -> None: ...
    def loss_and_gradients(
        self,
        towers: tuple[Any, Any],
        side: Any,
        state: Any,
        workspace: Any,
        gradients: tuple[Any, Any],
        stream: int,
    ) -> None: ...
    def backward(
        self,
        towers: tuple[Any, Any],
        side: Any,
        state: Any,
        workspace: Any,
        gradients: tuple[Any, Any],
        upstream: Any,
        stream: int,
    ) -> None: ...
    def check(self, towers: tuple[Any, Any], side: Any, state: Any, workspace: Any, stream: int) -> None: ...

class Ranks:
    """The calls of this process in one group."""

    def __new__(cls, rank: int, size: int, exchange: Callable[[int, memoryview, int, memoryview], None]) -> Ranks: ...
    def step(
        self,
        settings: Settings,
        towers: tuple[Any, Any],
        gradients: tuple[Any, Any],
        differentiate: bool,
        annotations: Mapping[str, Any],
        threads: int,
    ) -> tuple[list[float], float, bytearray]: ...
    def give_up(self, reason: str) -> NoReturn: ...
    def release(self) -> None: ...

def describe_loss(loss: str) -> tuple[str, list[tuple[float, list[str], int]]]: ...
def presets() -> list[str]: ...
def release_memory() -> None: ...
def addresses(query: Any, passage: Any) -> tuple[int, int]: ...
def cpu_step(
    settings: Settings,
    query: Any,
    passage: Any,
    gradients: tuple[Any, Any],
    differentiate: bool,
    annotations: Mapping[str, Any],
    row_losses: Any,
    threads: int,
) -> tuple[list[float], float]: ...
