def pytest_configure(config):
    # The marks in timm's test modules, which we import.
    marks = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout"
    for mark in marks.split():
        config.addinivalue_line("markers", f"{mark}: timm's")
