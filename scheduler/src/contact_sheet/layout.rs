//! Where everything goes on a contact sheet, in pixels.
use super::lettering::{LINE_HEIGHT, wrapped};

/// Side of the square that holds a picture.
pub const TILE: u32 = 256;
/// Distance between tiles and to the edges.
pub const MARGIN: u32 = 16;
/// Longer prompts are cut.
const MAX_PROMPT_LINES: usize = 4;
/// A sheet of many pictures grows downwards.
const MAX_COLUMNS: usize = 10;

/// One tile's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Left edge of the picture's square.
    pub x: u32,
    /// Its upper edge.
    pub y: u32,
    /// The prompt as it is written below.
    pub prompt_lines: Vec<String>,
}

/// A sheet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Width of the sheet.
    pub width: u32,
    /// Height of the sheet.
    pub height: u32,
    /// One place for each prompt, in their order, row by row.
    pub places: Vec<Place>,
}

impl Layout {
    /// Arranges tiles with these prompts in a grid somewhat wider than high. A row is as high as its longest prompt.
    pub fn new<'a>(prompts: impl Iterator<Item = &'a str>) -> Self {
        let wrapped: Vec<_> = prompts.map(|prompt| wrapped(prompt, TILE, MAX_PROMPT_LINES)).collect();
        let columns = columns(wrapped.len());
        let title = 2 * MARGIN + LINE_HEIGHT;
        let mut y = title;
        let mut places = Vec::with_capacity(wrapped.len());
        for row in wrapped.chunks(columns) {
            let mut x = MARGIN;
            for prompt_lines in row {
                places.push(Place { x, y, prompt_lines: prompt_lines.clone() });
                x += TILE + MARGIN;
            }
            let lines = row.iter().map(Vec::len).max().unwrap_or(0);
            // One more line for seed and verdict.
            let lines = u32::try_from(lines + 1).unwrap_or(u32::MAX);
            y += TILE + MARGIN / 2 + lines * LINE_HEIGHT + MARGIN;
        }
        let columns = u32::try_from(columns).unwrap_or(u32::MAX);
        Self { width: MARGIN + columns * (TILE + MARGIN), height: y, places }
    }
}

fn columns(tiles: usize) -> usize {
    let side = (1..=MAX_COLUMNS).find(|columns| columns * columns * 3 >= tiles * 4);
    side.unwrap_or(MAX_COLUMNS).min(tiles.max(2))
}

/// The size of a picture of `width` × `height` in a tile: reduced until it fits, or enlarged by a whole factor.
pub fn fitted(width: u32, height: u32) -> (u32, u32) {
    let longer = width.max(height).max(1);
    if longer <= TILE {
        let factor = TILE / longer;
        return (width * factor, height * factor);
    }
    let scale = |side: u32| {
        let scaled = u64::from(side) * u64::from(TILE) / u64::from(longer);
        u32::try_from(scaled).unwrap_or(TILE).max(1)
    };
    (scale(width), scale(height))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn grids_are_somewhat_wider_than_high() {
        let shapes: Vec<_> = [1, 2, 3, 4, 6, 12, 24, 48, 200].map(columns).into();
        assert_eq!(shapes, [2, 2, 2, 3, 3, 4, 6, 8, 10]);
    }

    #[test]
    fn pictures_fit_their_tile() {
        assert_eq!(fitted(128, 128), (256, 256));
        assert_eq!(fitted(512, 512), (256, 256));
        assert_eq!(fitted(512, 768), (170, 256));
        assert_eq!(fitted(100, 60), (200, 120));
        assert_eq!(fitted(2048, 64), (256, 8));
    }

    proptest! {
        #[test]
        fn tiles_stay_on_the_sheet_and_apart(prompts in proptest::collection::vec("[a-z ]{0,300}", 0..60)) {
            let layout = Layout::new(prompts.iter().map(String::as_str));
            prop_assert_eq!(layout.places.len(), prompts.len());
            for (index, place) in layout.places.iter().enumerate() {
                let lines = u32::try_from(place.prompt_lines.len()).unwrap() + 1;
                let bottom = place.y + TILE + lines * LINE_HEIGHT;
                prop_assert!(place.x + TILE + MARGIN <= layout.width && bottom < layout.height);
                for other in &layout.places[index + 1..] {
                    let beside = other.x >= place.x + TILE + MARGIN || place.x >= other.x + TILE + MARGIN;
                    prop_assert!(beside || other.y >= bottom);
                }
            }
        }
    }
}
