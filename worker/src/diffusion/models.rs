//! The networks, one file for each of diffusers' `models/` (and of transformers' CLIP).

pub mod attention;
pub mod autoencoder_kl;
pub mod clip_encoder;
pub mod clip_text_model;
pub mod clip_vision_model;
pub mod embeddings;
pub mod resnet;
pub mod transformer_2d;
pub mod unet_2d_blocks;
pub mod unet_2d_condition;
pub mod unet_2d_config;
pub mod vae;
