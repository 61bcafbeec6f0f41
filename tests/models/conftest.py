"""What every family must stand, as functions for tests to call with a small model of theirs."""
import pytest
import torch


@pytest.fixture
def onnxruntime_agrees(tmp_path):
    """(model, images): exported on one batch, ONNX Runtime gives what the model gives, on a batch twice as large."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def check(model, images):
        batch = torch.export.Dim("batch", min=2, max=16)
        torch.onnx.export(
            model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        x = torch.cat((images, images.flip(3)))
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-3, atol=1e-4)

    return check


@pytest.fixture
def compiles_in_one_graph():
    """(model, x): compiled without a graph break, the model gives the same."""

    def check(model, x):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))

    return check
