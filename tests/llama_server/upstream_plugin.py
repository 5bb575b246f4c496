"""A pytest plugin that runs llama.cpp's own server tests offline: every model they ask for is one local GGUF.

Set UPSTREAM_MODEL to its path; scripts/server_tests does, and says which server and options are under test.
"""

import os
import sys

import pytest


def pytest_configure(config):
    sys.path.insert(0, os.getcwd())  # tools/server/tests, for its utils
    import utils

    def local(make):
        def preset():
            server = make()
            if server.model_hf_repo:
                server.model_hf_repo = server.model_hf_file = None
                server.model_file = os.environ["UPSTREAM_MODEL"]
            return server

        return staticmethod(preset)

    for name, member in list(vars(utils.ServerPreset).items()):
        if isinstance(member, staticmethod) and name != "load_all":
            setattr(utils.ServerPreset, name, local(member.__func__))
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # would download all models

    def refuse(url, *_args, **_kwargs):
        pytest.fail(f"needs the network: {url}")

    utils.download_file = refuse
