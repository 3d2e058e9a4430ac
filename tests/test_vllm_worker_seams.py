"""Workers, runners and attention layers: what we rely on inside vLLM, name by name."""

from __future__ import annotations

import inspect

import engines  # noqa: F401  vLLM's environment
import pytest
from signatures import begins_with, has_fields, takes


def test_builders_are_made_by_groups_from_the_layers_backend():
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionMetadataBuilder, subclass_attention_backend
    from vllm.v1.worker.utils import AttentionGroup

    source = inspect.getsource(AttentionGroup.create_metadata_builders)
    assert "self.backend.get_builder_cls()" in source
    begins_with(
        AttentionMetadataBuilder.__init__,
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    )
    begins_with(AttentionMetadataBuilder.build, "self", "common_prefix_len", "common_attn_metadata")
    takes(AttentionMetadataBuilder.get_cudagraph_support, "vllm_config", "kv_cache_spec")
    assert AttentionMetadataBuilder.supports_update_block_table is False
    takes(subclass_attention_backend, "name_prefix", "attention_backend_cls", "builder_cls")
    assert "return self.attn_backend" in inspect.getsource(Attention.get_attn_backend)


def test_attention_metadata():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    has_fields(
        CommonAttentionMetadata,
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "max_seq_len",
        "block_table_tensor",
        "req_idx",
        "_num_computed_tokens_cache",
    )
    assert callable(CommonAttentionMetadata.replace)


def test_runners_pad_batches_for_graphs_with_rows_of_no_length():
    """And tell builders so on the host; what they write for a graph is read at its place."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    source = inspect.getsource(V1._prepare_inputs)
    assert "self.optimistic_seq_lens_cpu[num_reqs:].fill_(0)" in source
    assert "self.seq_lens[num_reqs:].fill_(0)" in source
    source = inspect.getsource(V1._build_attention_metadata)
    assert "seq_lens_cpu_upper_bound = self.optimistic_seq_lens_cpu[:num_reqs_padded]" in source
    source = inspect.getsource(V2.prepare_inputs)
    assert "seq_lens_cpu_upper_bound_np = np.zeros(num_reqs_padded" in source
    assert "query_start_loc_np[num_reqs + 1 :] = num_tokens" in source
    assert CUDAGraphMode.FULL_DECODE_ONLY.has_full_cudagraphs()
    assert not CUDAGraphMode.PIECEWISE.has_full_cudagraphs()
    source = inspect.getsource(AttentionMetadataBuilder)
    assert "self.vllm_config = vllm_config" in source
    begins_with(AttentionMetadataBuilder.build_for_cudagraph_capture, "self")
    assert "self.build(" in inspect.getsource(AttentionMetadataBuilder.build_for_cudagraph_capture)


def test_runners_know_prompt_lengths():
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.gpu_input_batch import InputBatch

    assert "self.num_prompt_tokens = " in inspect.getsource(InputBatch.__init__)
    assert "self.prompt_len = UvaBackedTensor(" in inspect.getsource(RequestState.__init__)
    from vllm.v1.worker.gpu.model_states import default

    assert "req_idx=input_batch.idx_mapping_np" in inspect.getsource(default)


def test_runners_have_tables_that_can_be_replaced():
    """What worker/starts.py does when pages of a running request have been copied."""
    from vllm.v1.worker.block_table import MultiGroupBlockTable
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    takes(MultiGroupBlockTable.add_row, "self", "block_ids", "row_idx")
    has_fields(CachedRequestState, "block_ids")
    source = inspect.getsource(GPUModelRunner._update_states)
    assert "block_ids.extend(new_ids)" in source, "tables grow at their ends"
    takes(BlockTables.append_block_ids, "self", "req_index", "new_block_ids", "overwrite")
    source = inspect.getsource(RequestState.__init__)
    assert "self.req_id_to_index" in source
    assert "self.index_to_req_id" in source


@pytest.mark.parametrize("name", ["cpu_worker.CPUWorker", "gpu_worker.Worker"])
def test_worker_methods(name):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker = resolve_obj_by_qualname(f"vllm.v1.worker.{name}")
    begins_with(worker.load_model, "self")
    begins_with(worker.get_kv_cache_spec, "self")
    begins_with(worker.initialize_from_config, "self", "kv_cache_config")
    begins_with(worker.execute_model, "self", "scheduler_output")


def test_the_cpu_kernel_writes_pages_where_we_probe():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    begins_with(
        CPUAttentionBackendImpl.do_kv_cache_update,
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    )


# ---- packed pages: the layer's impl, its spec and its cache


def test_attention_calls_the_impl_as_we_stand_in_for_it():
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    names = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    begins_with(CPUAttentionBackendImpl.forward, "self", *names)
    assert "self.impl.forward(" in inspect.getsource(attention.unified_attention_with_output)
    source = inspect.getsource(attention.unified_kv_cache_update)
    assert "attn_layer.impl.do_kv_cache_update(" in source
    assert CPUAttentionBackend.forward_includes_kv_cache_update is False
    for name in ("scale", "logits_soft_cap", "sinks"):
        assert f"self.{name} = " in inspect.getsource(CPUAttentionBackendImpl.__init__)
