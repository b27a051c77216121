"""Kinds of the group `trellis`; each topic has a file of its own."""

from __future__ import annotations

from tests.goldens.surfaces import flexicubes as flexicubes
from tests.goldens.trellis_mdt import mdt_dense as mdt_dense
from tests.goldens.trellis_mdt import mdt_sparse as mdt_sparse
from tests.goldens.trellis_nets import slat_dec_gs as slat_dec_gs
from tests.goldens.trellis_nets import slat_dec_mesh as slat_dec_mesh
from tests.goldens.trellis_nets import slat_dec_rf as slat_dec_rf
from tests.goldens.trellis_nets import slat_enc as slat_enc
from tests.goldens.trellis_nets import slat_flow as slat_flow
from tests.goldens.trellis_nets import ss_decoder as ss_decoder
from tests.goldens.trellis_nets import ss_encoder as ss_encoder
from tests.goldens.trellis_nets import ss_flow as ss_flow
from tests.goldens.trellis_samplers import sampler_dense as sampler_dense
from tests.goldens.trellis_samplers import sampler_slat as sampler_slat
from tests.goldens.trellis_sparse import sparse_spatial as sparse_spatial
from tests.goldens.trellis_sparse import subm_conv as subm_conv
from tests.goldens.trellis_sparse import window_attn as window_attn
