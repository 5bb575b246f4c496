"""A pytest plugin that runs llama.cpp's own server tests offline: every model they ask for is one local GGUF.

Set UPSTREAM_MODEL to its path; scripts/server_tests does, and says which server and options are under test.
"""

import os
import random
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

    def download(url, *_args, **_kwargs):
        name = url.rpartition("/")[2]
        if name.endswith(".gguf") and "lora" not in name.lower() and "mmproj" not in name.lower():
            return os.environ["UPSTREAM_MODEL"]  # a draft model, for one
        pytest.fail(f"needs the network: {url}")

    utils.download_file = download

    start = utils.ServerProcess.start

    def start_with_flash_attention(server, *args, **more):
        if server.fa == "off":  # a compressing cache needs it, so all servers get it
            server.fa = None
        start(server, *args, **more)

    utils.ServerProcess.start = start_with_flash_attention


def pytest_runtest_setup(item):
    random.seed(item.nodeid)  # each server gets the same requests
