"""Every field of vLLM's configuration: in the names of what is stored, or why not.

A field that isn't in the table fails the test, so that a new vLLM can't bring one that changes KV
values unnoticed. A field that says it is in must be read by the modules that make names.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

config = pytest.importorskip("vllm.config")

import lmcache_connector_vllm  # noqa: E402

IN = "in the chain: read by facts, identity or adapters"
DERIVED = "follows from fields that are in, from the checkpoint or from the layout"
LAYOUT = "in the layout of each layer group, which vLLM computes from it"
REFUSED = "refused, or left without a name, where it isn't as by default"
OTHERS = "described field by field below"
KERNEL = "which implementation computes the same function: rounding, as between two devices"
SCHEDULING = "when and in which batch a token is computed, not what"
PLACING = "on which device, process or host something is computed or kept"
MEMORY = "how much memory there is and where"
OUTPUT = "after the last layer: logits, sampling, answers"
INPUT = "makes token ids or media, which are in the chain themselves"
OBSERVING = "observes, logs or measures"
LOADING = "how weights are read, not which"
STATE = "Mamba's or a window's state: groups with it are refused"
SECURITY = "what may be asked for"
HANDING = "how KV or encoder outputs are moved, not what they are"
NOT_STORED = "doesn't concern tokens that are stored: accepted tokens alone are"

TABLE: dict[str, dict[str, str]] = {
    "VllmConfig": {
        OTHERS: (
            "model_config cache_config parallel_config scheduler_config load_config "
            "attention_config lora_config speculative_config kernel_config compilation_config"
        ),
        IN: "additional_config",
        REFUSED: "diffusion_config weight_transfer_config",
        DERIVED: "quant_config",
        PLACING: "device_config offload_config engram_config instance_id",
        KERNEL: "optimization_level performance_mode",
        STATE: "mamba_config",
        OUTPUT: "watermark_config structured_outputs_config reasoning_config aux_output_config",
        OBSERVING: "observability_config logging_config profiler_config",
        HANDING: "kv_transfer_config kv_events_config ec_transfer_config ec_manager_config",
        SCHEDULING: "shutdown_timeout",
    },
    "ModelConfig": {
        IN: (
            "model model_weights revision code_revision trust_remote_code dtype quantization "
            "quantization_config hf_config hf_text_config hf_config_path hf_overrides "
            "model_class_overrides max_model_len override_generation_config multimodal_config"
        ),
        DERIVED: (
            "is_submodel_config word_embeddings_untied_by_checkpoint spec_target_max_model_len "
            "config_format disable_sliding_window"
        ),
        OUTPUT: (
            "runner convert return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel "
            "enable_trace_replay generation_config logits_processors pooler_config seed"
        ),
        INPUT: (
            "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init enable_prompt_embeds "
            "io_processor_plugin renderer_num_workers"
        ),
        KERNEL: "enforce_eager disable_cascade_attn model_impl",
        SECURITY: (
            "allowed_local_media_path allowed_media_domains served_model_name hf_token "
            "allow_deprecated_quantization"
        ),
        MEMORY: (
            "enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend "
            "sleep_mode_offload_cudagraph enable_nccl_comm_suspend enable_cumem_allocator"
        ),
    },
    "MultiModalConfig": {
        IN: (
            "media_io_kwargs mm_processor_kwargs mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
            "video_pruning_rate video_pruning_method"
        ),
        INPUT: (
            "limit_per_prompt enable_mm_embeds mm_hasher_algorithm interleave_mm_strings "
            "allow_missing_mm_embeddings language_model_only mm_encoder_only"
        ),
        KERNEL: "mm_device_do_normalize mm_encoder_attn_backend mm_encoder_tp_mode",
        MEMORY: (
            "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb "
            "mm_tensor_ipc mm_ipc_gpu_memory_gb skip_mm_profiling"
        ),
        OBSERVING: "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin",
    },
    "CacheConfig": {
        IN: "cache_dtype kv_cache_dtype_skip_layers",
        DERIVED: "is_attention_free sliding_window",
        LAYOUT: "kv_cache_layout skip_page_size_padded",
        SCHEDULING: (
            "block_size user_specified_block_size prefix_match_unit enable_prefix_caching "
            "prefix_caching_hash_algo prefix_cache_retention_interval hash_block_size "
            "cache_hit_alignment_tokens effective_attention_block_size _block_size_resolved "
            "kv_sharing_fast_prefill"
        ),
        STATE: (
            "mamba_page_size_padded mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype "
            "mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len "
            "use_replayssm use_kda_recoverssm swa_bounded_replay"
        ),
        MEMORY: (
            "gpu_memory_utilization num_gpu_blocks_override num_gpu_blocks num_cpu_blocks "
            "kv_cache_size_tokens kv_cache_max_concurrency kv_cache_memory_bytes "
            "kv_offloading_size kv_offloading_backend"
        ),
    },
    "ParallelConfig": {
        IN: "tensor_parallel_size",
        REFUSED: (
            "pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size"
        ),
        KERNEL: (
            "all2all_backend disable_custom_all_reduce enable_dbo ubatch_size "
            "dbo_decode_token_threshold dbo_prefill_token_threshold enable_hc_sp "
            "enable_expert_parallel enable_batch_sharded_sampling enable_eplb eplb_config "
            "expert_placement_strategy dcp_kv_cache_interleave_size dcp_comm_backend "
            "dcp_q_replicate cp_kv_cache_interleave_size _allow_auto_resolve_cp_interleave_size"
        ),
        LOADING: "max_parallel_loading_workers enable_ep_weight_filter is_moe_model",
        PLACING: (
            "data_parallel_size data_parallel_size_local data_parallel_rank "
            "data_parallel_rank_local data_parallel_master_ip data_parallel_rpc_port "
            "dp_sync_interval data_parallel_master_port data_parallel_backend "
            "data_parallel_external_lb data_parallel_hybrid_lb enable_shm_tensor_arena "
            "enable_elastic_ep elastic_ep_max_dp_size disable_nccl_for_dp_synchronization "
            "ray_workers_use_nsight ray_runtime_env placement_group distributed_executor_backend "
            "worker_cls worker_extension_cls master_addr master_port node_rank nnodes numa_bind "
            "numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids "
            "distributed_timeout_seconds cpu_distributed_timeout_seconds world_size rank "
            "_data_parallel_master_port_list _coord_store_port data_parallel_index "
            "_api_process_count _api_process_rank enable_fault_tolerance fault_tolerance_config"
        ),
    },
    "SchedulerConfig": {
        SCHEDULING: (
            "max_num_batched_tokens max_num_scheduled_tokens max_num_seqs max_num_active_seqs "
            "long_prefill_token_threshold long_prefill_token_threshold_adaptive "
            "max_num_queued_reqs max_num_queued_tokens enable_chunked_prefill "
            "max_num_encoder_input_tokens encoder_cache_size policy disable_chunked_mm_input "
            "scheduler_cls scheduler_reserve_full_isl watermark prefill_schedule_interval "
            "async_scheduling stream_interval"
        ),
        LAYOUT: "disable_hybrid_kv_cache_manager",
        DERIVED: "runner_type is_multimodal_model",
    },
    "LoadConfig": {
        IN: "load_format",
        LOADING: (
            "download_dir safetensors_load_strategy safetensors_prefetch_num_threads "
            "safetensors_prefetch_block_size model_loader_extra_config device ignore_patterns "
            "use_tqdm_on_load pt_load_map_location"
        ),
    },
    "AttentionConfig": {
        IN: (
            "backend backend_per_kind use_prefill_query_quantization "
            "disable_flashinfer_q_quantization indexer_kv_dtype indexer_sparse_logits"
        ),
        REFUSED: "use_non_causal",
        KERNEL: (
            "minimax_m3_msa_decode_backend flash_attn_version "
            "flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv "
            "tq_max_kv_splits_for_cuda_graph use_trtllm_attention mla_prefill_backend "
            "sparse_mla_force_mqa sparse_mla_prefill_workspace_factor flex_attn_block_m "
            "flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size"
        ),
        PLACING: "hisparse_config",
    },
    "LoRAConfig": {
        IN: (
            "lora_dtype target_modules enable_tower_connector_lora enable_mixed_moe_lora_format "
            "enable_moe_shared_loras"
        ),
        INPUT: "default_mm_loras",
        KERNEL: "fully_sharded_loras specialize_active_lora",
        MEMORY: "max_lora_rank max_loras max_cpu_loras",
        OUTPUT: "max_lora_cls_labels",
    },
    "SpeculativeConfig": {
        IN: "method kv_cache_dtype draft_model_config draft_load_config",
        DERIVED: (
            "model quantization revision code_revision target_model_config "
            "target_parallel_config draft_parallel_config tensor_parallel_size max_model_len"
        ),
        LAYOUT: "draft_tensor_parallel_size",
        KERNEL: "enforce_eager moe_backend attention_backend index_share_for_mtp_iteration",
        NOT_STORED: (
            "num_speculative_tokens disable_padded_drafter_batch disable_eagle_block_drop "
            "use_local_argmax_reduction use_heterogeneous_vocab prompt_lookup_max "
            "prompt_lookup_min parallel_drafting num_speculative_tokens_per_batch_size "
            "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests "
            "suffix_decoding_max_spec_factor suffix_decoding_min_token_prob "
            "rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length "
            "enable_adaptive_verification draft_sample_method dspark_draft_topk"
        ),
    },
    "KernelConfig": {
        KERNEL: (
            "ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune "
            "enable_cutedsl_warmup enable_jit_warmup moe_backend sparse_indexer_topk_backend "
            "linear_backend linear_backend_per_quant"
        ),
    },
    "CompilationConfig": {
        KERNEL: (
            "mode debug_dump_path cache_dir compile_cache_save_format backend custom_ops "
            "ir_enable_torch_wrap splitting_ops compile_mm_encoder cudagraph_mm_encoder "
            "encoder_cudagraph_token_budgets encoder_cudagraph_max_vision_items_per_batch "
            "encoder_cudagraph_max_frames_per_batch cudagraph_decoder_replay "
            "decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold compile_sizes "
            "compile_ranges_endpoints inductor_compile_config inductor_passes cudagraph_mode "
            "cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs "
            "cudagraph_specialize_lora use_inductor_graph_partition pass_config "
            "max_cudagraph_capture_size dynamic_shapes_config local_cache_dir "
            "fast_moe_cold_start enabled_custom_ops disabled_custom_ops"
        ),
        OBSERVING: (
            "traced_files compilation_time encoder_compilation_time static_forward_context "
            "static_all_moe_layers"
        ),
    },
}
NAMERS = ("facts", "identity", "adapters")


def stated(name: str) -> list[str]:
    return [field for fields in TABLE[name].values() for field in fields.split()]


def unstated(cls: type) -> set[str]:
    """Fields of ``cls`` that the table says nothing about."""
    return {field.name for field in dataclasses.fields(cls)} - set(stated(cls.__name__))


@pytest.mark.parametrize("name", TABLE)
def test_every_field_is_in_the_chain_or_has_a_reason(name: str) -> None:
    cls = getattr(config, name)
    new = unstated(cls)
    assert not new, (
        f"vLLM's {name} has fields that nobody has judged: {', '.join(sorted(new))}. Do they "
        "change KV values? Then `facts` has to name them; else say here why not."
    )
    found = stated(name)
    assert len(found) == len(set(found)), "a field has two reasons"
    gone = set(found) - {field.name for field in dataclasses.fields(cls)}
    assert not gone, f"vLLM's {name} has no {', '.join(sorted(gone))} any more"


def test_a_new_field_is_noticed() -> None:
    @dataclasses.dataclass
    class CacheConfig(config.CacheConfig):
        kv_is_different_now: bool = False

    assert unstated(CacheConfig) == {"kv_is_different_now"}


@pytest.mark.parametrize("name", TABLE)
def test_what_is_in_the_chain_is_read(name: str) -> None:
    folder = Path(lmcache_connector_vllm.__path__[0])
    trees = [ast.parse((folder / f"{module}.py").read_text()) for module in NAMERS]
    read = {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    for reason in (IN, REFUSED):
        missing = set(TABLE[name].get(reason, "").split()) - read
        assert not missing, f"nothing reads {name}.{', '.join(sorted(missing))}"


def test_every_class_below_is_described() -> None:
    described = TABLE["VllmConfig"][OTHERS].split()
    types = {f.name: f.type for f in dataclasses.fields(config.VllmConfig)}
    for field in described:
        assert any(name in str(types[field]) for name in TABLE), field
