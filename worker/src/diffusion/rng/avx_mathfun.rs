//! The f32 logarithm, sine and cosine that torch's AVX2 kernel draws normals with, operation by operation.
//!
//! torch 2.11 takes them from `ATen/native/cpu/avx_mathfun.h` (Giovanni Garberoglio after Julien Pommier's
//! sse_mathfun, zlib licence; the polynomials are those of Stephen Moshier's Cephes). Its compiler fuses a product
//! that is only added to something into one rounding, so the fusing is copied here too: `mul_add` stands exactly
//! where the compiled kernel has an FMA. `mul_add` rounds once on every machine, with an FMA unit or without, so
//! results are the same everywhere.

/// Natural logarithm of a positive, normal number.
pub fn log(x: f32) -> f32 {
    const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
    // x = mantissa · 2^exponent with mantissa in [0.5, 1).
    let bits = x.max(f32::MIN_POSITIVE).to_bits();
    let mut exponent = ((bits >> 23) as i32 - 0x7f) as f32 + 1.0;
    let mantissa = f32::from_bits((bits & !0x7f80_0000) | 0.5_f32.to_bits());
    let mut x = mantissa - 1.0;
    if mantissa < SQRT_HALF {
        exponent -= 1.0;
        x += mantissa;
    }
    let z = x * x;
    let mut y = 7.037_683_6e-2_f32;
    for coefficient in [
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ] {
        y = y.mul_add(x, coefficient);
    }
    y *= x;
    y = y.mul_add(z, exponent * -2.121_944_4e-4);
    y = z.mul_add(-0.5, y);
    exponent.mul_add(0.693_359_4, x + y)
}

/// Sine and cosine of an angle from 0 to 2π.
pub fn sin_cos(x: f32) -> (f32, f32) {
    const FOUR_OVER_PI: f32 = 4.0 / std::f32::consts::PI;
    // The octant, rounded up to an even one, and the distance to it in three parts of π/4.
    let octant = ((x * FOUR_OVER_PI) as i32 + 1) & !1;
    let y = octant as f32;
    let x = y.mul_add(-0.785_156_25, x);
    let x = y.mul_add(-2.418_756_5e-4, x);
    let x = y.mul_add(-3.774_895e-8, x);
    let z = x * x;

    let mut cosine = 2.443_315_7e-5_f32.mul_add(z, -1.388_731_6e-3);
    cosine = cosine.mul_add(z, 4.166_664_6e-2);
    cosine = (cosine * z).mul_add(z, -(z * 0.5)) + 1.0;

    let mut sine = (-1.951_529_6e-4_f32).mul_add(z, 8.332_161e-3);
    sine = sine.mul_add(z, -1.666_665_5e-1);
    sine = (sine * z).mul_add(x, x);

    let (sine, cosine) = if octant & 2 == 0 { (sine, cosine) } else { (cosine, sine) };
    let sine_sign = if octant & 4 == 0 { 1.0 } else { -1.0 };
    let cosine_sign = if (octant - 2) & 4 == 0 { -1.0 } else { 1.0 };
    (sine * sine_sign, cosine * cosine_sign)
}
