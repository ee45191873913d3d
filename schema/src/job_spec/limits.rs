//! What a job may ask for. The jobs table repeats these limits as CHECKs; a test compares the two.

/// Sides are multiples of this: one latent cell is 8 × 8 pixels.
pub const SIDE_STEP: u32 = 8;
/// The smallest side: the U-Net halves the latents three times, so a smaller picture would vanish on the way down.
pub const MIN_SIDE: u32 = 64;
/// The largest side: Stable Diffusion v1 was trained at 512 and repeats itself far beyond that.
pub const MAX_SIDE: u32 = 2048;
/// The most pixels: attention grows with their square, and a typing error should not take a GPU for an hour.
pub const MAX_PIXELS: u32 = 2048 * 1024;
/// The most denoising steps: with 1,000, the first training step visited would be number 1,000 of 0 to 999.
pub const MAX_INFERENCE_STEPS: u32 = 999;
/// The longest cache interval: with as many steps as there can be, only the first one runs the whole UNet.
pub const MAX_CACHE_INTERVAL: u32 = MAX_INFERENCE_STEPS;
/// The largest guidance scale: pictures saturate long before it.
pub const MAX_GUIDANCE_SCALE: f32 = 50.0;
/// The largest seed: torch's CPU generator keeps 32 bits, so a larger seed would silently draw a smaller one's picture.
pub const MAX_SEED: u64 = u32::MAX as u64;
/// The longest prompt in characters. The text encoder reads 77 tokens; this only keeps books out of the catalog.
pub const MAX_PROMPT_CHARS: usize = 10_000;
/// The longest client reference in characters.
pub const MAX_CLIENT_REF_CHARS: usize = 200;
