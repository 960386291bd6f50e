"""Run by the Python that has nemo-gym: its resources servers, each under its name. Arguments: port, names."""

import importlib
import sys
from unittest.mock import MagicMock

import uvicorn
from fastapi import FastAPI
from nemo_gym.base_resources_server import BaseResourcesServerConfig, SimpleResourcesServer
from nemo_gym.server_utils import ServerClient


def own(module, base):
    found = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, base))
    return next(each for each in found if each.__module__ == module.__name__)


port, together = int(sys.argv[1]), FastAPI()
for name in sys.argv[2:]:
    module = importlib.import_module(f"resources_servers.{name}.app")
    config = own(module, BaseResourcesServerConfig)(host="127.0.0.1", port=port, entrypoint="app.py", name=name)
    # Of Gym's other servers there is none, and these ask for none.
    server = own(module, SimpleResourcesServer)(config=config, server_client=MagicMock(spec=ServerClient))
    app = server.setup_webserver()
    server.setup_exception_middleware(app)
    together.mount(f"/{name}", app)
uvicorn.run(together, host="127.0.0.1", port=port, log_level="warning")
