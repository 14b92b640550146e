"""The client of `vla-pruner serve`, and of any server that speaks openpi's protocol. It needs numpy, msgpack and
websockets, and no torch.

```python
from vla_pruner.client import ActionChunkBroker, PolicyClient

with PolicyClient("ws://127.0.0.1:8000") as client:
    result = client.infer({"observation/image": image, "observation/state": state, "prompt": "push the puck"})
    result["actions"]  # (horizon, dim)
```
"""

from vla_pruner.client.broker import ActionChunkBroker
from vla_pruner.client.connection import PolicyClient
from vla_pruner.client.errors import ClientError, CodecError, ConnectionLost, ServerError

__all__ = ["ActionChunkBroker", "ClientError", "CodecError", "ConnectionLost", "PolicyClient", "ServerError"]
