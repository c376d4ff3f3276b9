// cooperative_tile.wgsl: fragments of the towers as cooperative matrices. cooperative_tile_emulated.wgsl does the same without.

alias A = coop_mat16x16<f16, A>;
alias B = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;
