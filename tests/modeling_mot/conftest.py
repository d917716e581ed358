"""A processor of tiny tokenizers and a server of files, for the tests of the one reader of pictures and sounds."""

import pytest


@pytest.fixture(scope="module")
def processor():
    """Its pictures show a green background where they are transparent."""
    from .test_processor import build_processor

    return build_processor(background=[10, 200, 30])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder, and the address at which a server of this machine shows it."""
    from .media_forms import site_of

    with site_of(tmp_path_factory.mktemp("site")) as folder_and_address:
        yield folder_and_address
