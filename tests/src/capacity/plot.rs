//! The curves as a picture: pictures a second over GPUs, both on logarithmic axes, with a line for what the GPUs could do.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster};

use super::Curve;

const WIDTH: u32 = 900;
const HEIGHT: u32 = 600;
const LEFT: u32 = 90;
const RIGHT: u32 = 30;
const TOP: u32 = 60;
const BOTTOM: u32 = 60;
const BLACK: Rgb<u8> = Rgb([20, 20, 20]);
const GRID: Rgb<u8> = Rgb([225, 225, 225]);
const COLORS: [Rgb<u8>; 2] = [Rgb([31, 98, 190]), Rgb([200, 80, 30])];

/// A logarithmic axis from one power of ten to another.
#[derive(Debug, Clone, Copy)]
struct Axis {
    from: i32,
    to: i32,
    pixels: (u32, u32),
}

impl Axis {
    fn around(values: impl Iterator<Item = f64>, pixels: (u32, u32)) -> Self {
        let (low, high) =
            values.fold((f64::MAX, 1.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        let (from, to) = (low.max(1e-3).log10().floor() as i32, high.log10().ceil() as i32);
        Self { from, to: to.max(from + 1), pixels }
    }

    /// Where a value lies, in pixels from the left or the top.
    fn place(self, value: f64) -> f32 {
        let share = (value.max(1e-9).log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        let (start, end) = (f64::from(self.pixels.0), f64::from(self.pixels.1));
        (start + share * (end - start)) as f32
    }

    fn powers(self) -> impl Iterator<Item = f64> {
        (self.from..=self.to).map(|power| 10_f64.powi(power))
    }
}

/// Draws the curves.
pub fn draw(title: &str, curves: &[Curve]) -> RgbImage {
    let mut canvas = RgbImage::from_pixel(WIDTH, HEIGHT, Rgb([255, 255, 255]));
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let gpus = Axis::around(points().map(|point| point.gpus as f64), (LEFT, WIDTH - RIGHT));
    let rates = Axis::around(points().map(|point| point.outcome.rate), (HEIGHT - BOTTOM, TOP));
    for power in gpus.powers() {
        let x = gpus.place(power);
        line(&mut canvas, (x, TOP as f32), (x, (HEIGHT - BOTTOM) as f32), GRID);
        text(&mut canvas, &format!("{power:.0}"), (x as u32 - 10, HEIGHT - BOTTOM + 8), BLACK);
    }
    for power in rates.powers() {
        let y = rates.place(power);
        line(&mut canvas, (LEFT as f32, y), ((WIDTH - RIGHT) as f32, y), GRID);
        text(&mut canvas, &format!("{power:>6}"), (LEFT - 70, y as u32 - 8), BLACK);
    }
    for ((curve, color), row) in curves.iter().zip(COLORS.into_iter().cycle()).zip(0..) {
        let place = |gpu_count: usize, rate: f64| (gpus.place(gpu_count as f64), rates.place(rate));
        for pair in curve.points.windows(2) {
            let ends = |of: fn(&Curve, usize) -> f64| {
                (place(pair[0].gpus, of(curve, pair[0].gpus)), place(pair[1].gpus, of(curve, pair[1].gpus)))
            };
            // What the GPUs alone would draw, dotted.
            let (from, to) = ends(|curve, gpus| gpus as f64 * curve.workload.pictures_per_second);
            if to.1 >= TOP as f32 {
                dotted(&mut canvas, from, to, color);
            }
            let (from, to) =
                (place(pair[0].gpus, pair[0].outcome.rate), place(pair[1].gpus, pair[1].outcome.rate));
            line(&mut canvas, from, to, color);
        }
        for point in &curve.points {
            dot(&mut canvas, place(point.gpus, point.outcome.rate), color);
        }
        let fed = curve.fed().map_or("none".to_owned(), |point| point.gpus.to_string());
        let legend = format!("{}: {fed} GPUs fed, then {} binds", curve.name, curve.binds_first());
        text(&mut canvas, &legend, (WIDTH - RIGHT - 400, HEIGHT - BOTTOM - 60 + row * 20), color);
    }
    text(&mut canvas, title, (LEFT, 16), BLACK);
    text(&mut canvas, "GPUs", (WIDTH / 2, HEIGHT - 28), BLACK);
    text(&mut canvas, "pictures/s", (6, TOP - 24), BLACK);
    canvas
}

fn dot(canvas: &mut RgbImage, (x, y): (f32, f32), color: Rgb<u8>) {
    for dx in -3..=3_i32 {
        for dy in -3..=3_i32 {
            put(canvas, x as i32 + dx, y as i32 + dy, color);
        }
    }
}

fn line(canvas: &mut RgbImage, from: (f32, f32), to: (f32, f32), color: Rgb<u8>) {
    for (x, y, _) in steps(from, to) {
        put(canvas, x, y, color);
        put(canvas, x, y + 1, color);
    }
}

fn dotted(canvas: &mut RgbImage, from: (f32, f32), to: (f32, f32), color: Rgb<u8>) {
    for (x, y, _) in steps(from, to).filter(|(_, _, step)| step % 6 < 2) {
        put(canvas, x, y, color);
    }
}

fn steps(from: (f32, f32), to: (f32, f32)) -> impl Iterator<Item = (i32, i32, u32)> {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let count = dx.abs().max(dy.abs()).ceil().max(1.0) as u32;
    (0..=count).map(move |step| {
        let share = step as f32 / count as f32;
        ((from.0 + dx * share) as i32, (from.1 + dy * share) as i32, step)
    })
}

fn put(canvas: &mut RgbImage, x: i32, y: i32, color: Rgb<u8>) {
    if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
        && x < canvas.width()
        && y < canvas.height()
    {
        canvas.put_pixel(x, y, color);
    }
}

fn text(canvas: &mut RgbImage, text: &str, (left, top): (u32, u32), color: Rgb<u8>) {
    let mut x = left;
    for character in text.chars() {
        let Some(raster) = get_raster(character, FontWeight::Regular, RasterHeight::Size16) else { continue };
        for (row, pixels) in (0..).zip(raster.rows()) {
            for (column, coverage) in (0..).zip(pixels) {
                if *coverage > 100 {
                    put(canvas, (x + column) as i32, (top + row) as i32, color);
                }
            }
        }
        x += raster.width() as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::{Demands, Machines, curves};

    #[test]
    fn every_curve_is_drawn_in_its_color() {
        let demands = Demands { postgres: 0.001, postgres_lease: 0.0, broker: 0.000_1, relay: 0.000_05 };
        let few = curves(|_| demands, Machines { postgres_cores: 2 });
        let canvas = draw("a test", &few);
        for color in COLORS {
            let count = canvas.pixels().filter(|pixel| **pixel == color).count();
            assert!(count > 500, "only {count} pixels of {color:?}");
        }
    }

    #[test]
    fn an_axis_holds_its_values() {
        let axis = Axis::around([10.0, 640.0].into_iter(), (100, 500));
        assert_eq!((axis.from, axis.to), (1, 3));
        assert!((axis.place(100.0) - 300.0).abs() < 0.5);
    }
}
